"""A model read byte by byte gives the logits of one forward over the whole documents, whatever its configuration."""

import random
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from blt.checkpoint import LanguageModel
from blt.decoder import Decoder
from blt.entropy_model import STREAM_BYTES, EntropyModel, EntropyModelConfig
from blt.generation import generate, stream
from blt.layers import RopeScaling
from blt.model import BLT, BLTConfig
from blt.online_blt import OnlineBLT
from blt.patching import PatchRule, starts_to_lengths
from blt.recorded_steps import RecordedBLT
from blt.vocabulary import BOS, BYTE_OFFSET, EOS, VOCABULARY_SIZE
from tests.model_cases import blt_config, randomised, transformer_config

FLOAT32 = 1e-4
"""Products over other numbers of rows at once round differently; logits are of the order of 1."""


HASHES: list[dict[str, object]] = [{}, {"group_sizes": ()}, {"group_sizes": (1, 8), "functions": 2}]


SCALING = RopeScaling(factor=8.0, original_max_position_embeddings=16)


@st.composite
def configs(draw: st.DrawFn) -> BLTConfig:
    encoder_layers = draw(st.sampled_from(["all", "last", "none"]))
    local: dict[str, object] = {"window": draw(st.sampled_from([1, 2, 7])), "rope_theta": 500.0}
    return blt_config(
        encoder=local | {"layers": draw(st.integers(1, 2)), "kv_heads": draw(st.sampled_from([None, 1]))},
        latent={"kv_heads": draw(st.sampled_from([None, 1])), "rope_scaling": draw(st.sampled_from([None, SCALING]))},
        decoder={"layers": draw(st.integers(1, 2)), "window": draw(st.sampled_from([3, 7]))},
        cross={
            "encoder_layers": encoder_layers,
            "decoder_layers": draw(st.sampled_from(["all", "first", "none"])),
            "pooling": draw(st.sampled_from(["max", "mean", "min"])),
            "slots": 1 if encoder_layers == "none" else draw(st.integers(1, 3)),
        },
        hashes=draw(st.sampled_from(HASHES)),
    )


def documents_with_starts(seed: int, num_documents: int, length: int, rate: float) -> tuple[Tensor, Tensor]:
    """Ids [B,T] that open with BOS, and starts [B,T+1]."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(BYTE_OFFSET, 260, (num_documents, length), generator=generator)
    ids[:, 0] = BOS
    starts = torch.rand(num_documents, length + 1, generator=generator) < rate
    starts[:, :2] = True
    return ids, starts


@settings(max_examples=100)
@given(
    config=configs(),
    seed=st.integers(0, 1000),
    opened=st.lists(st.sampled_from([1, 2, 6, 7, 8, 9, 20]), min_size=1, max_size=3),
    rate=st.sampled_from([0.0, 0.3, 1.0]),
    chunk_bytes=st.sampled_from([1, 5, 4096]),
    online_type=st.sampled_from([OnlineBLT, RecordedBLT]),
)
def test_logits_are_those_of_a_forward(
    config: BLTConfig, seed: int, opened: list[int], rate: float, chunk_bytes: int, online_type: type[OnlineBLT]
) -> None:
    """`RecordedBLT` unrecorded, with room for so little that it grows."""
    model, num_steps = randomised(BLT(config), seed), 14
    ids, starts = documents_with_starts(seed, len(opened), max(opened) + num_steps, rate)
    with (
        torch.inference_mode(),
        patch("blt.online_blt.CHUNK_BYTES", chunk_bytes),
        patch("blt.recorded_steps.FIRST_COLUMNS", 4),
        patch("blt.recorded_steps.FIRST_PATCH_BYTES", 3),
    ):
        expected = model(ids, starts_to_lengths(starts))
        online = online_type(model, len(opened))
        for row, length in enumerate(opened):
            found = online.open(row, ids[row, :length], starts[row, : length + 1])
            assert torch.allclose(found, expected[row, length - 1], rtol=FLOAT32, atol=FLOAT32), f"prompt of {length}"
        rows = list(range(len(opened)))
        for step in range(num_steps):
            if step == num_steps // 2:
                online.keep(rows[1:] if len(rows) > 1 else rows)
                rows = rows[1:] if len(rows) > 1 else rows
            places = [opened[row] + step for row in rows]
            found = online.step(
                [int(ids[row, place]) for row, place in zip(rows, places, strict=True)],
                [bool(starts[row, place + 1]) for row, place in zip(rows, places, strict=True)],
            )
            assert torch.allclose(found, expected[rows, places], rtol=FLOAT32, atol=FLOAT32), f"step {step}"


def language_model(config: BLTConfig, rule: PatchRule) -> LanguageModel:
    entropy_config = EntropyModelConfig(transformer=transformer_config(layers=2, window=9))
    return LanguageModel(
        model=randomised(BLT(config), 1),
        entropy_model=randomised(EntropyModel(entropy_config), 2),
        patch_rule=rule,
        reset_on_newline=False,
        config=config,
        provenance={},
    )


def first_tie(lm: LanguageModel, prompt: bytes, continuation: bytes) -> int:
    """The first step of a greedy run whose two best logits lie within 1e-4, or the number of steps."""
    decoder = Decoder(lm, 1)
    logits = decoder.open([prompt])[0]
    for step, byte in enumerate(continuation):
        allowed = [EOS, *range(BYTE_OFFSET, VOCABULARY_SIZE)]
        best, second = logits[allowed].topk(2).values.tolist()
        if best - second < FLOAT32:
            return step
        logits = decoder.step([byte + BYTE_OFFSET])[0]
    return len(continuation)


def test_unequal_prompts_are_their_single_runs() -> None:
    lm = language_model(blt_config(), PatchRule(threshold=4.0, max_patch_length=6))
    source = random.Random(0)
    prompts = [source.randbytes(length) for length in (0, 1, 5, 6, 7, 8, 40, 200)]
    together = generate(lm, prompts, max_new_bytes=40)
    assert isinstance(together, list)
    ties = 0
    for prompt, found in zip(prompts, together, strict=True):
        alone = b"".join(stream(lm, prompt, max_new_bytes=40))
        certain = first_tie(lm, prompt, alone)
        ties += certain < len(alone)
        assert found[:certain] == alone[:certain], f"prompt of {len(prompt)} bytes, certain for {certain}"
    assert ties < len(prompts) // 2, f"{ties} of {len(prompts)} runs have a step whose two best logits are equal"


@pytest.mark.parametrize(
    ("length", "online_type"),
    [(STREAM_BYTES - 3, OnlineBLT), (2 * STREAM_BYTES + 70, OnlineBLT), (2 * STREAM_BYTES + 70, RecordedBLT)],
)
def test_long_prompts(length: int, online_type: type[OnlineBLT]) -> None:
    """Chunks, rotary tables and the latent cache grow; entropies' positions start again while bytes are read."""
    model = randomised(BLT(blt_config()), 3)
    ids, starts = documents_with_starts(7, 1, length + 20, 0.25)
    with torch.inference_mode():
        expected = model(ids, starts_to_lengths(starts))[0]
        online = online_type(model, 1)
        found = [online.open(0, ids[0, :length], starts[0, : length + 1])]
        for place in range(length, length + 20):
            found.append(online.step([int(ids[0, place])], [bool(starts[0, place + 1])])[0])
    assert torch.allclose(torch.stack(found), expected[length - 1 :], rtol=FLOAT32, atol=FLOAT32)
