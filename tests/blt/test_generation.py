"""Generation: online patches equal offline ones, and the bytes are those of the model asked step by step."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from blt.checkpoint import LanguageModel
from blt.decoder import Decoder
from blt.entropy_model import STREAM_BYTES, EntropyModel, document_entropies
from blt.errors import ConfigError
from blt.generation import continuations, generate, stream
from blt.online_entropies import OnlineEntropies
from blt.online_patches import OnlinePatches
from blt.patching import (
    ENTROPY_STEPS_PER_NAT,
    PatchRule,
    document_patch_starts,
    quantize_entropies,
    stored_entropies,
)
from blt.recorded_steps import RecordedEntropies
from blt.sampling import Sampling, next_ids
from blt.vocabulary import BOE, BOS, BPE_DELIMITER, BYTE_OFFSET, EOS, VOCABULARY_SIZE, encode

Build = Callable[..., LanguageModel]
TEXT = b"Four score\nand seven years ago \xc3\xa9\xff\x00\n\nour fathers brought forth, 1863 -- a new nation.\n"
RULES = {
    "entropy": PatchRule(threshold=5.2, max_patch_length=5),
    "monotonic": PatchRule(threshold=0.02, monotonic=True),
    "threshold_add": PatchRule(threshold=5.1, threshold_add=0.01, max_patch_length=7),
    "space": PatchRule(kind="space", max_patch_length=4),
    "fixed": PatchRule(kind="fixed", patch_size=3),
    "byte": PatchRule(kind="byte"),
}


def in_a_gap(entropies: torch.Tensor, rule: PatchRule) -> PatchRule:
    """The rule with its threshold moved to the middle of the widest gap near it, where 1e-4 nats decide nothing."""
    values = entropies[1:] - entropies[:-1] if rule.monotonic else entropies
    values = values.sort().values
    middle = len(values) // 4 + int((values[1:] - values[:-1])[len(values) // 4 : -len(values) // 4].argmax())
    return replace(rule, threshold=float((values[middle] + values[middle + 1]) / 2))


ONLINE = [OnlineEntropies, RecordedEntropies]


@pytest.mark.parametrize("online_type", ONLINE)
@pytest.mark.parametrize("reset", [False, True])
def test_streamed_entropies_are_those_of_the_document(
    small_entropy_model: EntropyModel, reset: bool, online_type: type[OnlineEntropies]
) -> None:
    document = TEXT * 3
    (expected,) = document_entropies(small_entropy_model, [document], reset_on_newline=reset)
    online, ids = online_type(small_entropy_model, reset, 1), [BOS, *encode(document).tolist()]
    with torch.inference_mode():
        pieces = [online.open(0, torch.tensor(ids[:50]))] + [online.step([byte_id]) for byte_id in ids[50:]]
    # The tolerance that documents' entropies are promised to.
    assert torch.allclose(torch.cat(pieces), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("online_type", ONLINE)
def test_streamed_entropies_of_a_long_document(
    small_entropy_model: EntropyModel, online_type: type[OnlineEntropies]
) -> None:
    document = (TEXT * (STREAM_BYTES // len(TEXT) * 2 + 2))[: 2 * STREAM_BYTES + 100]
    (expected,) = document_entropies(small_entropy_model, [document])
    ids = torch.cat((torch.tensor([BOS]), encode(document)))
    # Two documents at once: one opened before its positions start again, one exactly there the second time.
    lengths = (STREAM_BYTES - 5, 2 * STREAM_BYTES)
    online = online_type(small_entropy_model, False, 2)
    with torch.inference_mode():
        found = [[online.open(row, ids[:length])] for row, length in enumerate(lengths)]
        for i in range(40):
            for row, value in enumerate(online.step([int(ids[length + i]) for length in lengths]).split(1)):
                found[row].append(value)
    for pieces, length in zip(found, lengths, strict=True):
        assert torch.allclose(torch.cat(pieces), expected[: length + 40], rtol=0, atol=1e-4)


def assert_online_starts(online: OnlinePatches, offline: torch.Tensor) -> None:
    """TEXT read side by side from four places on; two of the four stop on the way."""
    opened = [0, 1, 2, 40]
    with torch.inference_mode():
        for row, length in enumerate(opened):
            assert torch.equal(online.open(row, TEXT[:length]), offline[: length + 1]), f"prompt of {length} bytes"
        for step in range(len(TEXT) - 2):
            if step == len(TEXT) - 40:
                online.keep([2, 0])
                opened = [2, 0]
            places = [length + step for length in opened]
            expected = [bool(offline[place + 1]) for place in places]
            assert online.step([TEXT[place] + BYTE_OFFSET for place in places]) == expected, f"at bytes {places}"


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("reset", [False, True])
def test_online_patches_are_the_offline_patches(language_model: Build, name: str, reset: bool) -> None:
    entropy_model, rule = language_model().entropy_model, RULES[name]
    assert entropy_model is not None
    (entropies,) = document_entropies(entropy_model, [TEXT], reset_on_newline=reset)
    if rule.kind == "entropy":
        rule = in_a_gap(entropies, rule)
    offline = document_patch_starts(TEXT, entropies if rule.needs_entropies else None, rule)
    assert_online_starts(OnlinePatches(rule, entropy_model, reset, 4), offline)
    assert 0 < int(offline.sum()) <= len(TEXT) + 1


QUANTIZED_RULES = {
    "entropy": PatchRule(threshold=163 / 32, quantized=True),
    "monotonic": PatchRule(threshold=0.0, monotonic=True, quantized=True, max_patch_length=4),
    "threshold_add": PatchRule(threshold=162 / 32, threshold_add=1 / 32, quantized=True),
}


@pytest.mark.parametrize("name", QUANTIZED_RULES)
def test_online_patches_of_a_quantized_rule(language_model: Build, name: str) -> None:
    entropy_model, rule = language_model().entropy_model, QUANTIZED_RULES[name]
    assert entropy_model is not None
    (entropies,) = document_entropies(entropy_model, [TEXT])
    steps = entropies * ENTROPY_STEPS_PER_NAT
    # The tolerance of streamed entropies must decide nothing: closer to a step it rounds to either side.
    assert (steps - steps.round()).abs().min() > 1e-4 * ENTROPY_STEPS_PER_NAT
    offline = document_patch_starts(TEXT, stored_entropies(quantize_entropies(entropies)), rule)
    assert_online_starts(OnlinePatches(rule, entropy_model, False, 4), offline)
    assert 10 < int(offline.sum()) < len(TEXT) - 10


def naive_greedy(lm: LanguageModel, prompt: bytes, count: int) -> bytes:
    """Whole documents through the public offline functions, one more byte each time."""
    document = prompt
    for _ in range(count):
        entropies = None
        if lm.patch_rule.needs_entropies:
            assert lm.entropy_model is not None
            (entropies,) = document_entropies(lm.entropy_model, [document], reset_on_newline=lm.reset_on_newline)
        starts = [0, *(document_patch_starts(document, entropies, lm.patch_rule).nonzero().flatten() + 1).tolist()]
        lengths = [end - start for start, end in zip(starts, [*starts[1:], len(document) + 2], strict=True)]
        ids = torch.cat((torch.tensor([BOS]), encode(document)))
        with torch.no_grad():
            logits = lm.model(ids[None], torch.tensor([lengths]))[0, -1]
        logits[[BOE, BOS, BPE_DELIMITER]] = -torch.inf
        chosen = int(logits.argmax())
        if chosen == EOS:
            break
        document += bytes([chosen - BYTE_OFFSET])
    return document[len(prompt) :]


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("prompt", [b"", b"x", b"Four\nscore"])
def test_greedy_is_the_naive_loop(language_model: Build, name: str, prompt: bytes) -> None:
    lm = language_model(RULES[name], reset_on_newline=True)
    assert generate(lm, prompt, max_new_bytes=12) == naive_greedy(lm, prompt, 12)


@pytest.mark.parametrize("name", ["entropy", "fixed"])
def test_pieces_know_their_patches(language_model: Build, name: str) -> None:
    """Documents stop at different times; starts stay with their document and equal those of the whole text."""
    lm, prompts = language_model(RULES[name]), [b"", b"Four\nscore", b"\xff\x00 years"]
    sampling = Sampling(temperature=1.0, seed=5)
    alone = generate(lm, prompts[1], max_new_bytes=30, temperature=1.0, seed=5)
    assert isinstance(alone, bytes)
    found = [(b"", list[bool]()) for _ in prompts]
    for index, piece in continuations(lm, prompts, max_new_bytes=30, sampling=sampling, stop=alone[12:14]):
        data, starts = found[index]
        found[index] = data + piece.data, [*starts, *piece.starts]
    assert found[1][0] == alone[:12]
    assert max(len(data) for data, _ in found) > 12
    for prompt, (data, starts) in zip(prompts, found, strict=True):
        entropies = None
        if lm.patch_rule.needs_entropies:
            assert lm.entropy_model is not None
            (entropies,) = document_entropies(lm.entropy_model, [prompt + data])
        offline = document_patch_starts(prompt + data, entropies, lm.patch_rule)
        assert starts == offline[len(prompt) : -1].tolist()


def test_several_prompts_are_their_single_runs(language_model: Build) -> None:
    lm, prompts = language_model(), [b"", b"a longer prompt", b"\xff\x00", b"a longer prompt"]
    sampled = generate(lm, prompts, max_new_bytes=10, temperature=0.8, top_k=40, top_p=0.9, seed=7)
    assert sampled == [generate(lm, p, max_new_bytes=10, temperature=0.8, top_k=40, top_p=0.9, seed=7) for p in prompts]
    assert generate(lm, [], max_new_bytes=10) == []


def test_every_prompt_may_have_a_seed_of_its_own(language_model: Build) -> None:
    lm, prompts, seeds = language_model(), [b"a", b"a", b"b"], [1, 2, 1]
    found = generate(lm, prompts, max_new_bytes=10, temperature=1.0, seed=seeds)
    alone = [generate(lm, p, max_new_bytes=10, temperature=1.0, seed=s) for p, s in zip(prompts, seeds, strict=True)]
    assert found == alone
    assert found[0] != found[1]


def test_seed_fixes_the_draws(language_model: Build) -> None:
    lm = language_model()
    runs = [generate(lm, b"seed", max_new_bytes=12, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    assert generate(lm, b"seed", max_new_bytes=3, temperature=1.0) is not None


def test_stream_joins_to_generate_one_byte_at_a_time(language_model: Build) -> None:
    lm = language_model()
    pieces = list(stream(lm, b"stream", max_new_bytes=9, temperature=1.0, seed=3))
    assert [len(piece) for piece in pieces] == [1] * 9
    assert b"".join(pieces) == generate(lm, b"stream", max_new_bytes=9, temperature=1.0, seed=3)
    assert list(stream(lm, b"stream", max_new_bytes=0)) == []


class Scripted:
    """Stands for a decoder whose next bytes are known: each answer is the continuation of one prompt.

    Vowels start patches.
    """

    def __init__(self, answers: list[bytes], ends: bool = False) -> None:
        self.ids = [[byte + BYTE_OFFSET for byte in answer] + [EOS] * ends for answer in answers]
        self.starts: list[bool] = []

    def open(self, prompts: list[bytes]) -> torch.Tensor:
        next_bytes = [ids.pop(0) for ids in self.ids]
        self.starts = [byte_id in encode(b"aeiou").tolist() for byte_id in next_bytes]
        return torch.nn.functional.one_hot(torch.tensor(next_bytes), VOCABULARY_SIZE).float()

    def step(self, ids: list[int]) -> torch.Tensor:
        assert len(ids) == len(self.ids)
        return self.open([])

    def keep(self, documents: list[int]) -> None:
        self.ids = [self.ids[document] for document in documents]


@pytest.mark.parametrize(
    ("answer", "stop", "expected"),
    [
        (b"aaabcd", [b"aab"], b"a"),
        (b"abcabd!", [b"abd"], b"abc"),
        (b"one\n\ntwo", b"\n\n", b"one"),
        (b"abcd", [b"cd", b"bcd", b"d"], b"a"),
        (b"abcd", [b"bx", b"c"], b"ab"),
        (b"abcd", [b"de"], b"abcd"),
        (b"stop", [b"stop"], b""),
    ],
)
def test_stop_strings_end_the_output_and_are_not_part_of_it(
    language_model: Build, monkeypatch: pytest.MonkeyPatch, answer: bytes, stop: bytes | list[bytes], expected: bytes
) -> None:
    monkeypatch.setattr("blt.generation.Decoder", lambda lm, num_documents: Scripted([answer] * num_documents))
    lm = language_model()
    assert generate(lm, b"", max_new_bytes=len(answer), stop=stop) == expected
    pieces = list(stream(lm, b"", max_new_bytes=len(answer), stop=stop))
    assert b"".join(pieces) == expected
    assert all(pieces)
    whole = list(continuations(lm, [b"", b""], max_new_bytes=len(answer), sampling=Sampling(), stop=stop))
    assert [piece.data for index, piece in whole if index == 1] == pieces
    starts = [starts_patch for index, piece in whole if index == 0 for starts_patch in piece.starts]
    assert starts == [byte in b"aeiou" for byte in expected]


def test_eos_ends_the_output(language_model: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [b"end", b"", b"a longer end", b"stopped"]
    monkeypatch.setattr("blt.generation.Decoder", lambda lm, num: Scripted(answers[:num], ends=True))
    assert generate(language_model(), b"", max_new_bytes=99, stop=[b"dx"]) == b"end"
    assert generate(language_model(), [b""] * 4, max_new_bytes=99, stop=[b"dx", b"ed"]) == [*answers[:3], b"stopp"]


def test_specials_but_eos_are_never_chosen() -> None:
    logits = torch.full((VOCABULARY_SIZE,), -50.0)
    logits[[BOE, BOS, BPE_DELIMITER]] = 50.0
    logits[EOS] = 1.0
    for temperature in (0.0, 1.0, 100.0):
        sampling = Sampling(temperature=temperature, seed=0)
        (chosen,) = next_ids(logits[None], sampling, [sampling.generator()])
        assert chosen in {EOS, *range(BYTE_OFFSET, VOCABULARY_SIZE)}
    assert next_ids(logits[None], Sampling(), [Sampling(seed=0).generator()]) == [EOS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_are_left_as_they_are(dtype: torch.dtype) -> None:
    logits = torch.zeros(2, VOCABULARY_SIZE, dtype=dtype)
    next_ids(logits, Sampling(), [])
    assert torch.equal(logits, torch.zeros_like(logits))


def test_a_model_in_float64_generates(language_model: Build) -> None:
    prompts, lm = [b"hello there", b""], language_model()
    wanted = generate(lm, prompts, max_new_bytes=8)
    lm.model.double()
    assert lm.entropy_model is not None
    lm.entropy_model.double()
    assert generate(lm, prompts, max_new_bytes=8) == wanted


def draws(sampling: Sampling, logits: torch.Tensor, count: int = 1500) -> torch.Tensor:
    chosen = next_ids(logits.expand(count, -1), sampling, [sampling.generator()] * count)
    return torch.bincount(torch.tensor(chosen) - BYTE_OFFSET, minlength=4).double() / count


def test_sampling_follows_the_softmax_cut_by_top_k_and_top_p() -> None:
    logits = torch.full((VOCABULARY_SIZE,), -torch.inf)
    probabilities = torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=torch.float64)
    logits[BYTE_OFFSET : BYTE_OFFSET + 4] = probabilities.log().float()
    expected = {
        (1.0, None, None): probabilities,
        (0.5, None, None): probabilities**2,
        (1.0, 2, None): torch.tensor([0, 0.4, 0.3, 0]),
        (1.0, None, 0.65): torch.tensor([0, 0.4, 0.3, 0]),
        (1.0, None, 0.75): torch.tensor([0, 0.4, 0.3, 0.2]),
        (1.0, 3, 0.5): torch.tensor([0, 0.4, 0.3, 0]),
        (1.0, None, 1e-9): torch.tensor([0, 1.0, 0, 0]),
        (1.0, 500, 1.0): probabilities,
        (1e-300, None, None): torch.tensor([0, 1.0, 0, 0]),
    }
    for (temperature, top_k, top_p), weights in expected.items():
        found = draws(Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=0), logits)
        # 1500 draws: a standard error is at most 0.013.
        assert torch.allclose(found, weights.double() / weights.sum(), atol=0.05)
        assert bool(((weights == 0) <= (found == 0)).all())


def test_decoding_leaves_the_model_trainable(language_model: Build) -> None:
    lm = language_model()
    decoder = Decoder(lm, 1)
    decoder.open([b"abc"])
    assert not decoder.step([70]).requires_grad
    ids = torch.tensor([[BOS, 70, 71]])
    lm.model(ids, torch.ones(1, 4, dtype=torch.int64)).sum().backward()
    assert all(p.grad is not None for p in lm.model.local_decoder.blocks.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": "text"}, "must be bytes, got str"),
        ({"prompts": [b"a", "text"]}, "prompts must be bytes, got str"),
        ({"max_new_bytes": -1}, "max_new_bytes"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"stop": [b""]}, "empty"),
        ({"stop": "text"}, "stop must be bytes"),
        ({"prompts": [b"a", b"b"], "seed": [1]}, "one for each of 2 prompts, got 1"),
    ],
)
def test_arguments_out_of_range(language_model: Build, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        generate(language_model(), **({"prompts": b"a"} | arguments))  # type: ignore[arg-type]


def test_rules_that_cannot_be_followed_are_refused_before_the_first_byte(language_model: Build) -> None:
    with pytest.raises(ConfigError, match="top_k looks ahead"):
        stream(language_model(PatchRule(kind="top_k", patch_size=4)), b"a")
    with pytest.raises(ConfigError, match="needs the entropy model"):
        stream(replace(language_model(), entropy_model=None), b"a")
    space = replace(language_model(PatchRule(kind="space")), entropy_model=None)
    assert len(generate(space, b"a", max_new_bytes=3)) <= 3
