"""The respondent: likelihoods are those of one pass over the whole text with patches found byte by byte; long texts are
read as `blt eval` reads them; contexts and prompts are cut at characters and counted; greedy is what generation gives.
"""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blt.checkpoint import LanguageModel
from blt.errors import CheckpointError, ConfigError, DataError
from blt.generation import generate
from blt.online_patches import OnlinePatches
from blt.patching import PatchRule
from blt.vocabulary import BOS, BYTE_OFFSET, EOS, encode
from pipelines.evaluate.config import WindowConfig
from pipelines.evaluate.likelihood import patched_group, score_texts
from pipelines.evaluate.respondent import Generation, Respondent, RespondentConfig, last_characters
from pipelines.evaluate.scoring import score_documents
from tests.small_language_model import small_language_model

SENTENCE = "Zwölf Boxkämpfer jagen Viktor über den Deich".encode()
TEXTS = [b"", b"a", b"Four score and seven", SENTENCE, b"\xff\x00 \n" * 9]
RULE = PatchRule(threshold=5.0333, max_patch_length=6)
"""Near the median of the entropies of TEXTS, and 4e-3 nats from any of them: what rounding does decides nothing."""
RULES = {
    "entropy": RULE,
    "quantized": replace(RULE, threshold=161 / 32, quantized=True),
    "space": PatchRule(kind="space", max_patch_length=6),
    "fixed": PatchRule(kind="fixed", patch_size=3),
}


@functools.cache
def double(rule: PatchRule = RULE) -> LanguageModel:
    """The small model with its BLT in float64: sums in another order differ by 1e-12. Entropies stay float32."""
    lm = small_language_model(rule)
    return replace(lm, model=lm.model.double())


@functools.cache
def logits_alone(rule: PatchRule, text: bytes) -> torch.Tensor:
    """Logits [n + 1, V] after BOS and each byte: one pass over the whole text, its patches found byte by byte."""
    lm = double(rule)
    patches = OnlinePatches(rule, lm.entropy_model, lm.reset_on_newline)
    with torch.inference_mode():
        starts = [True, *patches.open(0, b"").tolist()]
        for byte in text:
            starts.append(patches.step([byte + BYTE_OFFSET])[0])
        places = [place for place, start in enumerate(starts) if start]
        lengths = torch.tensor(np.diff([*places, len(starts)]))
        ids = torch.cat((torch.tensor([BOS]), encode(text)))
        return lm.model(ids[None], lengths[None], torch.zeros_like(ids)[None])[0]


def nats_alone(text: bytes, first: int = 0, rule: PatchRule = RULE) -> float:
    """-ln p of the bytes from `first` on."""
    found = logits_alone(rule, text)[:-1].log_softmax(-1)
    return -float(found[torch.arange(first, len(text)), encode(text)[first:]].sum())


def greedy_alone(text: bytes, first: int) -> bool:
    """Whether every byte from `first` on is the likeliest of bytes and EOS."""
    logits = logits_alone(RULE, text)[:-1]
    allowed = [EOS, *range(BYTE_OFFSET, logits.shape[1])]
    return all(allowed[int(logits[i, allowed].argmax())] == text[i] + BYTE_OFFSET for i in range(first, len(text)))


def test_patches_are_of_several_bytes() -> None:
    for rule in RULES.values():
        group = patched_group(double(rule), TEXTS, 8192)
        assert 1.2 < group.borders[-1] / len(group.patch_starts(0, len(TEXTS))) < 4


@pytest.mark.parametrize("name", RULES)
def test_texts_cost_what_one_pass_costs(name: str) -> None:
    found = Respondent(double(RULES[name]), RespondentConfig()).text_nats(TEXTS)
    assert found == pytest.approx([nats_alone(text, rule=RULES[name]) for text in TEXTS], rel=1e-12)


@pytest.mark.parametrize("batch_bytes", [1, 200])
def test_a_continuation_costs_what_it_costs_after_its_context(batch_bytes: int) -> None:
    """At every border: in the middle of patches and of characters too."""
    cases = [(text, border) for text in TEXTS[:4] for border in range(len(text) + 1)]
    pairs = [(text[:border], text[border:]) for text, border in cases]
    found = Respondent(double(), RespondentConfig(batch_bytes=batch_bytes)).likelihoods(pairs)
    assert [answer.nats for answer in found] == pytest.approx([nats_alone(*case) for case in cases], rel=1e-12)
    assert [answer.greedy for answer in found] == [greedy_alone(*case) for case in cases]


def test_probabilities_of_the_next_byte_and_the_end_add_up() -> None:
    """All bytes after a context, and EOS, BOS and the other special ids beside them, are one distribution."""
    pairs = [(b"Four score", bytes([byte])) for byte in range(256)]
    found = Respondent(double(), RespondentConfig()).likelihoods(pairs)
    special = logits_alone(RULE, b"Four score")[-1].softmax(-1)[:BYTE_OFFSET].sum()
    assert sum(np.exp(-answer.nats) for answer in found) + float(special) == pytest.approx(1, abs=1e-12)
    assert sum(answer.greedy for answer in found) == 1


def test_greedy_is_what_generation_gives() -> None:
    lm = small_language_model(RULE)
    prompts = [b"", b"Four score", "über".encode()]
    written = [generate(lm, prompt, max_new_bytes=12) for prompt in prompts]
    respondent = Respondent(lm, RespondentConfig())
    assert all(answer.greedy for answer in respondent.likelihoods(list(zip(prompts, written, strict=True))))
    others = [text[:-1] + bytes([text[-1] ^ 1]) for text in written if text]
    assert others
    pairs = [(prompt, text) for prompt, text in zip(prompts, others, strict=True)]
    assert not any(answer.greedy for answer in respondent.likelihoods(pairs))


@pytest.mark.parametrize("limits", [(9, 30), (40, 16)])
def test_long_texts_are_read_as_documents_are_evaluated(limits: tuple[int, int]) -> None:
    lm = double()
    windows = WindowConfig(sequence_patches=limits[0], sequence_bytes=limits[1])
    found = [float(scores.nats.sum()) for scores in score_texts(lm, TEXTS, windows)]
    group = patched_group(lm, TEXTS, 8192)
    expected = score_documents(lm.model, group, sequence_patches=limits[0], sequence_bytes=limits[1], batch_bytes=32768)
    assert found == pytest.approx(expected.nats.tolist(), rel=1e-12)
    whole = [nats_alone(text) for text in TEXTS]
    assert found[3] != pytest.approx(whole[3], rel=1e-6), "a window is shorter than this text"


def test_a_long_context_is_cut_at_a_character_and_counted() -> None:
    lm = double()
    respondent = Respondent(lm, RespondentConfig(sequence_bytes=26))
    context, continuation = ("ü" * 20).encode(), b" and"
    (answer,) = respondent.likelihoods([(context, continuation)])
    # 24 bytes fit beside BOS and EOS: 4 of the continuation, and 10 characters of the context.
    assert answer.nats == pytest.approx(nats_alone(context[-20:] + continuation, 20), rel=1e-12)
    assert (respondent.num_cut, respondent.bytes_cut) == (1, 20)
    (answer,) = respondent.likelihoods([(context[:20], continuation)])
    assert (respondent.num_cut, respondent.bytes_cut) == (1, 20), "what fits is not counted"


def test_a_continuation_longer_than_a_window_is_read_in_several() -> None:
    lm = double()
    respondent = Respondent(lm, RespondentConfig(sequence_bytes=12))
    (answer,) = respondent.likelihoods([(b"cut away", SENTENCE)])
    assert answer.nats == pytest.approx(respondent.text_nats([SENTENCE])[0], rel=1e-12)
    assert (respondent.num_cut, respondent.bytes_cut) == (1, 8)


def test_prompts_are_continued_as_generate_continues_them() -> None:
    lm = small_language_model(RULE)
    how = Generation(max_new_bytes=9, stop=("é".encode(), b"th"))
    found = Respondent(lm, RespondentConfig(batch_prompts=2)).continuations(TEXTS, how)
    assert found == [generate(lm, text, max_new_bytes=9, stop=how.stop) for text in TEXTS]
    drawn = replace(how, temperature=1.0, top_k=40, top_p=0.9, seed=3)
    found = Respondent(lm, RespondentConfig(batch_prompts=2)).continuations(TEXTS, drawn)
    assert found == [
        generate(lm, text, max_new_bytes=9, stop=how.stop, temperature=1.0, top_k=40, top_p=0.9, seed=3)
        for text in TEXTS
    ]


@pytest.mark.parametrize(("max_new_bytes", "kept"), [(4, 20), (30, 12)])
def test_a_long_prompt_is_cut_and_counted(max_new_bytes: int, kept: int) -> None:
    lm = small_language_model(RULE)
    respondent = Respondent(lm, RespondentConfig(sequence_bytes=26))
    found = respondent.continuations([SENTENCE, b"short"], Generation(max_new_bytes=max_new_bytes))
    assert found[0] == generate(lm, SENTENCE[-kept:], max_new_bytes=max_new_bytes)
    assert found[1] == generate(lm, b"short", max_new_bytes=max_new_bytes)
    assert (respondent.num_cut, respondent.bytes_cut) == (1, len(SENTENCE) - kept)


def test_progress_tells_of_every_question() -> None:
    told: list[int] = []
    respondent = Respondent(small_language_model(RULE), RespondentConfig(batch_prompts=2))
    respondent.text_nats(TEXTS, told.append)
    respondent.likelihoods([(b"a", text) for text in TEXTS], told.append)
    respondent.continuations(TEXTS, Generation(max_new_bytes=1), told.append)
    assert sum(told) == 3 * len(TEXTS)
    assert Respondent(double(), RespondentConfig()).text_nats([]) == []


@given(text=st.text(max_size=20), most_bytes=st.integers(0, 30))
def test_the_end_of_a_text_begins_with_a_character(text: str, most_bytes: int) -> None:
    data = text.encode("utf-8", "replace")
    kept = last_characters(data, most_bytes)
    assert data.endswith(kept)
    assert kept.decode() == data.decode()[len(data.decode()) - len(kept.decode()) :]
    assert len(kept) <= most_bytes
    longer = data.decode()[len(data.decode()) - len(kept.decode()) - 1 :] if len(kept) < len(data) else ""
    assert not longer or len(longer.encode()) > most_bytes, "no longer end fits"


@given(data=st.binary(max_size=20), most_bytes=st.integers(0, 30))
def test_the_end_of_any_bytes(data: bytes, most_bytes: int) -> None:
    kept = last_characters(data, most_bytes)
    assert data.endswith(kept)
    assert min(len(data), most_bytes) - 3 <= len(kept) <= most_bytes


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(ConfigError, match="top_k looks ahead"):
        Respondent(small_language_model(PatchRule(kind="top_k", patch_size=4)), RespondentConfig())
    with pytest.raises(ConfigError, match="needs the entropy model"):
        Respondent(replace(small_language_model(), entropy_model=None), RespondentConfig())
    with pytest.raises(DataError, match="a patch of 6 bytes does not fit"):
        Respondent(double(RULES["space"]), RespondentConfig(sequence_bytes=5)).text_nats([b"a" * 40])
    with pytest.raises(ConfigError, match="batch_prompts must be at least 1"):
        RespondentConfig(batch_prompts=0)
    broken = small_language_model(RULE)
    with torch.no_grad():
        broken.model.local_decoder.output.weight[7] = torch.nan
    with pytest.raises(CheckpointError, match="not finite"):
        Respondent(broken, RespondentConfig()).text_nats([b"abc"])
