"""Self-speculation gives the logits, patch starts and bytes of reading one byte after the other."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blt.checkpoint import LanguageModel
from blt.decoder import Decoder
from blt.entropy_model import STREAM_BYTES
from blt.errors import ConfigError
from blt.generation import generate, stream
from blt.model import BLTConfig
from blt.patching import PatchRule
from blt.speculation import Draft, SpeculativeDecoder
from blt.vocabulary import BYTE_OFFSET, VOCABULARY_SIZE
from tests.blt.test_online_blt import configs, language_model
from tests.model_cases import blt_config

CLOSE = 1e-9
"""In float64 sums of several rows round otherwise than those of one."""
NEWLINE = ord("\n") + BYTE_OFFSET


def wide(lm: LanguageModel) -> LanguageModel:
    assert lm.entropy_model is not None
    lm.model.double()
    lm.entropy_model.double()
    return lm


def assert_same_steps(lm: LanguageModel, prompt: bytes, num_steps: int, seed: int, rate_of_others: float) -> None:
    """Bytes are the most likely ones, or at this rate others."""
    source = random.Random(seed)
    plain, ahead = Decoder(lm, 1), SpeculativeDecoder(lm)
    logits = plain.open([prompt])
    torch.testing.assert_close(ahead.open([prompt]), logits, rtol=CLOSE, atol=CLOSE)
    for step in range(num_steps):
        byte_id = int(logits[0, BYTE_OFFSET:].argmax()) + BYTE_OFFSET
        if source.random() < rate_of_others:
            byte_id = source.choice([NEWLINE, source.randrange(BYTE_OFFSET, VOCABULARY_SIZE)])
        logits = plain.step([byte_id])
        torch.testing.assert_close(ahead.step([byte_id]), logits, rtol=CLOSE, atol=CLOSE, msg=f"step {step}")
        assert ahead.starts == plain.starts, f"step {step}"


RULES = [
    PatchRule(threshold=5.3),
    PatchRule(threshold=5.0, max_patch_length=3),
    PatchRule(threshold=0.0),
    PatchRule(threshold=9.0, max_patch_length=20),
    PatchRule(threshold=0.02, monotonic=True),
]


@settings(max_examples=50)
@given(
    config=configs(),
    rule=st.sampled_from(RULES),
    reset=st.booleans(),
    prompt=st.sampled_from([b"", b"a", b"some\nlines", bytes(range(40))]),
    seed=st.integers(0, 1000),
    rate_of_others=st.sampled_from([0.0, 0.2, 1.0]),
)
def test_logits_are_those_of_the_decoder(
    config: BLTConfig, rule: PatchRule, reset: bool, prompt: bytes, seed: int, rate_of_others: float
) -> None:
    """Past the windows of 1 to 9 positions, so that places are taken over and given back."""
    lm = replace(wide(language_model(config, rule)), reset_on_newline=reset)
    assert_same_steps(lm, prompt, 30, seed, rate_of_others)


@pytest.mark.parametrize("length", [STREAM_BYTES - 12, STREAM_BYTES - 1])
def test_where_positions_start_again(length: int) -> None:
    """A context's rotary positions, 8192 ids after BOS."""
    lm = wide(language_model(blt_config(), PatchRule(threshold=5.3)))
    assert_same_steps(lm, random.Random(0).randbytes(length), 30, 0, 0.0)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_continuations_are_the_same(temperature: float) -> None:
    """Drawn bytes are often others than those that were drafted; stop strings end in a draft."""
    lm = wide(language_model(blt_config(), PatchRule(threshold=5.3, max_patch_length=6)))
    for prompt in (b"", b"a prompt"):
        plain = generate(lm, prompt, max_new_bytes=80, temperature=temperature, seed=3)
        assert isinstance(plain, bytes)
        for stop in ((), plain[40:43]):
            expected = generate(lm, prompt, max_new_bytes=80, temperature=temperature, seed=3, stop=stop)
            found = stream(lm, prompt, max_new_bytes=80, temperature=temperature, seed=3, stop=stop, speculate=True)
            assert b"".join(found) == expected


def test_what_cannot_be_read_ahead() -> None:
    by_entropy, by_size = (language_model(blt_config(), rule) for rule in (RULES[0], PatchRule(kind="byte")))
    with pytest.raises(ConfigError, match="speculate reads one document ahead, got 2 prompts"):
        generate(by_entropy, [b"a", b"b"], speculate=True)
    with pytest.raises(ConfigError, match="kind byte reads no entropies"):
        generate(by_size, b"a", speculate=True)


@contextmanager
def counted_drafts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    lengths: list[int] = []
    read_ahead = Draft._read_ahead

    def counted(self: Draft, byte_id: int) -> list[object]:
        drafted = read_ahead(self, byte_id)
        lengths.append(len(drafted))
        return drafted

    with monkeypatch.context() as patched:
        patched.setattr(Draft, "_read_ahead", counted)
        yield lengths


def test_drafts_are_as_long_as_they_are_of_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without ends of patches they grow; where each byte ends one, a draft is that byte."""
    never, always = PatchRule(threshold=9.0), PatchRule(threshold=0.0)
    for rule, expected in ((never, [4, 5, 6, 7, 8, 8, 8]), (always, [1] * 20)):
        with counted_drafts(monkeypatch) as lengths:
            assert_same_steps(wide(language_model(blt_config(), rule)), b"prompt", sum(expected), 0, 0.0)
        assert lengths == expected
