"""Entropies: values in nats, and a document's independence of its company, row length and chunking; long documents.

Tolerance in float32: 1e-4 nats, as promised (seen: some 1e-6). In float64: 1e-6, since entropies are handed out as
float32 numbers of up to ln 260 = 5.6 (rounding 2.4e-7); logits themselves are held to 1e-9 by test_model_oracle.py.
"""

import math
from collections.abc import Sequence
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from blt import entropy_model, layers
from blt.entropy_model import (
    STREAM_BYTES,
    ContextStream,
    EntropyModel,
    EntropyModelConfig,
    document_entropies,
    document_entropies_and_nats,
    document_nats,
    next_byte_entropy,
)
from blt.errors import ConfigError
from blt.layers import TransformerConfig
from blt.patching import PatchRule, document_patch_starts
from blt.vocabulary import BOS, EOS, encode
from tests.model_cases import randomised, transformer_config

PROMISED, FLOAT64 = 1e-4, 1e-6
WINDOW = 20


def model_of(window: int = WINDOW, *, width: int = 16, dtype: torch.dtype = torch.float32) -> EntropyModel:
    config = EntropyModelConfig(transformer=transformer_config(width=width, layers=2, window=window))
    return randomised(EntropyModel(config), seed=1).to(dtype)


def random_document(num_bytes: int, seed: int = 0) -> bytes:
    generator = torch.Generator().manual_seed(seed)
    return bytes(torch.randint(0, 256, (num_bytes,), generator=generator).tolist())


@torch.no_grad()
def alone(model: EntropyModel, context: Tensor) -> Tensor:
    """Entropies of one context of ids in one pass."""
    return next_byte_entropy(model(context[None], torch.zeros(1, len(context), dtype=torch.int64)))[0]


def with_bos(document: bytes) -> Tensor:
    return torch.cat((torch.tensor([BOS]), encode(document)))


def assert_entropies(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


def test_entropy_values() -> None:
    logits = torch.zeros(4, 260)
    logits[1, :2] = 50.0  # two equal choices
    logits[2, 7] = 1e4  # one choice; the others' probabilities underflow
    logits[3] = -torch.inf
    logits[3, 5] = 0.0  # forbidden ids count 0, not NaN
    expected = torch.tensor([math.log(260), math.log(2), 0.0, 0.0])
    torch.testing.assert_close(next_byte_entropy(logits), expected, rtol=0, atol=1e-6)


def test_entropy_against_float64_and_in_bfloat16() -> None:
    logits = torch.randn(3, 5, 260, generator=torch.Generator().manual_seed(0)) * 4
    p = torch.softmax(logits.double(), -1)
    torch.testing.assert_close(next_byte_entropy(logits).double(), -(p * p.log()).sum(-1), rtol=0, atol=2e-6)
    narrow = next_byte_entropy(logits.bfloat16())
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow, next_byte_entropy(logits.bfloat16().float()), rtol=0, atol=0)


DOCUMENTS = st.lists(st.one_of(st.binary(max_size=3), st.binary(min_size=15, max_size=90)), max_size=7)


@settings(max_examples=60)
@given(DOCUMENTS, st.sampled_from([1, 2, 13, 64, 129, 8192, 100_000]), st.booleans(), st.sampled_from([1, 3]))
def test_independent_of_company_and_chunking(
    documents: list[bytes], row_bytes: int, wide: bool, rows_at_once: int
) -> None:
    """One row after the other as on CPU, and several at once as on CUDA."""
    model = model_of(dtype=torch.float64 if wide else torch.float32)
    expected = [alone(model, with_bos(document)) for document in documents]
    with patch.object(entropy_model, "_rows_at_once", return_value=rows_at_once):
        found = document_entropies(model, documents, row_bytes=row_bytes)
    assert_entropies(found, expected, FLOAT64 if wide else PROMISED)


def test_long_documents_side_by_side() -> None:
    """Of different lengths, across a multiple of 8192, in chunks: each as by itself."""
    model = model_of(window=20, dtype=torch.float64)
    documents = [random_document(n, seed=n) for n in (STREAM_BYTES + 300, 50, 1500, STREAM_BYTES + 40, 700)]
    expected = [document_entropies(model, [document])[0] for document in documents]
    with patch.object(entropy_model, "_rows_at_once", return_value=3):
        assert_entropies(document_entropies(model, documents, row_bytes=600), expected, FLOAT64)


@pytest.mark.parametrize("row_bytes", [100, 127, 300, 1000])
def test_several_query_blocks(row_bytes: int) -> None:
    """Rows and chunks around the block of 128, a window that is no multiple of it, documents longer than a row."""
    model = model_of(window=150, dtype=torch.float64)
    documents = [random_document(n, seed=n) for n in (0, 400, 90, 1, 128, 250)]
    expected = [alone(model, with_bos(document)) for document in documents]
    assert_entropies(document_entropies(model, documents, row_bytes=row_bytes), expected, FLOAT64)


def test_patches_are_independent_too() -> None:
    """With the threshold in a gap between entropies, patches are equal for every packing."""
    model = model_of()
    documents = [random_document(n, seed=n) for n in (300, 0, 40, 1, 129)]
    reference = document_entropies(model, documents, row_bytes=8192)
    ordered = torch.cat(reference).sort().values
    middle = ordered[len(ordered) // 2 :][:50]
    place = int(middle.diff().argmax())
    rule = PatchRule(threshold=float(middle[place : place + 2].mean()))
    assert float(middle.diff().max()) > 2 * PROMISED
    for row_bytes in (1, 50, 300):
        for document, entropies, expected in zip(
            documents, document_entropies(model, documents, row_bytes=row_bytes), reference, strict=True
        ):
            starts = document_patch_starts(document, entropies, rule)
            assert torch.equal(starts, document_patch_starts(document, expected, rule))


def exact_rotations(positions_BT: Tensor, config: TransformerConfig) -> Tensor:
    """`blt.layers.rotations` with float64 angles, which a position of any size leaves exact."""
    pair = torch.arange(0, config.head_width, 2, dtype=torch.float64)
    angles = positions_BT[..., None, None].double() * config.rope_theta ** (-pair / config.head_width)
    return torch.polar(torch.ones_like(angles), angles)


@pytest.mark.parametrize(("window", "row_bytes"), [(2, STREAM_BYTES), (65, STREAM_BYTES), (65, 3000)])
def test_streaming_equals_one_banded_pass(window: int, row_bytes: int) -> None:
    """Two multiples of 8192 are crossed. The one pass turns by float64 angles: float32 ones at its positions, up to
    16,684, move entropies by 1e-4 themselves, while those of the stream stay below 8192 + window (seen: 7e-5)."""
    model = model_of(window)
    document = random_document(2 * STREAM_BYTES + 300)
    (found,) = document_entropies(model, [document], row_bytes=row_bytes)
    with patch.object(layers, "rotations", exact_rotations):
        expected = alone(model.double(), with_bos(document))
    torch.testing.assert_close(found, expected, rtol=0, atol=PROMISED)


def test_streams_of_any_row_length_agree() -> None:
    """Beyond 8192 positions start again at multiples of it whatever the row length, so angles are the same numbers."""
    model = model_of(dtype=torch.float64)
    document = random_document(STREAM_BYTES + 400)
    (reference,) = document_entropies(model, [document])
    for row_bytes in (4096, 777):
        (found,) = document_entropies(model, [document], row_bytes=row_bytes)
        torch.testing.assert_close(found, reference, rtol=0, atol=FLOAT64)


@pytest.mark.parametrize("piece_bytes", [1, 7, 100, 8200])
def test_context_stream_equals_one_pass(piece_bytes: int) -> None:
    """Fed in pieces of any size, across a multiple of 8192 where the pieces are large enough to get there."""
    model = model_of(dtype=torch.float64)
    context = with_bos(random_document(STREAM_BYTES + 50 if piece_bytes >= 100 else 200))
    stream = ContextStream(model)
    with torch.no_grad():
        logits = torch.cat([stream.feed(piece[None])[0] for piece in context.split(piece_bytes)])
    assert stream.position == len(context)
    torch.testing.assert_close(next_byte_entropy(logits), alone(model, context), rtol=0, atol=PROMISED)


@pytest.mark.parametrize("reset", [False, True])
def test_nats_are_of_the_distributions_of_the_entropies(reset: bool) -> None:
    """-ln p of each byte and of EOS under the contexts that the entropies have."""
    model = model_of(dtype=torch.float64)
    documents = [b"", b"a\nbc\n\n", random_document(150)]
    for document, nats in zip(documents, document_nats(model, documents, reset_on_newline=reset), strict=True):
        ids, next_ids = with_bos(document), torch.cat((encode(document), torch.tensor([EOS])))
        newlines = (ids == encode(b"\n")).nonzero().flatten().tolist() if reset else []
        with torch.no_grad():
            contexts = [context for context in ids.tensor_split(newlines) if len(context)]
            logits = torch.cat([model(context[None])[0] for context in contexts])
        expected = -torch.log_softmax(logits, -1).gather(1, next_ids[:, None])[:, 0]
        assert nats.dtype == torch.float32
        torch.testing.assert_close(nats, expected.float(), rtol=0, atol=FLOAT64)


@pytest.mark.parametrize("row_bytes", [1, 64, 8192])
def test_entropies_and_nats_of_one_pass_are_those_of_two(row_bytes: int) -> None:
    model, documents = model_of(), [b"", b"a\nbc\n\n", random_document(150)]
    entropies = document_entropies(model, documents, reset_on_newline=True, row_bytes=row_bytes)
    nats = document_nats(model, documents, reset_on_newline=True, row_bytes=row_bytes)
    both = document_entropies_and_nats(model, documents, reset_on_newline=True, row_bytes=row_bytes)
    assert all(torch.equal(found, expected) for (found, _), expected in zip(both, entropies, strict=True))
    assert all(torch.equal(found, expected) for (_, found), expected in zip(both, nats, strict=True))


LINES = st.lists(st.binary(max_size=30).map(lambda line: line.replace(b"\n", b" ")), min_size=1, max_size=6)


@settings(max_examples=30)
@given(st.lists(LINES, max_size=3), st.sampled_from([1, 10, 8192]))
def test_newline_opens_a_context(texts: list[list[bytes]], row_bytes: int) -> None:
    """Entropies with the reset are those of the lines alone, each after the newline that opens it (the first: BOS)."""
    model = model_of(dtype=torch.float64)
    expected = []
    for lines in texts:
        contexts = [with_bos(lines[0]), *(encode(b"\n" + line) for line in lines[1:])]
        expected.append(torch.cat([alone(model, context) for context in contexts]))
    documents = [b"\n".join(lines) for lines in texts]
    found = document_entropies(model, documents, reset_on_newline=True, row_bytes=row_bytes)
    assert_entropies(found, expected, FLOAT64)


def test_reset_changes_nothing_without_newlines() -> None:
    model, document = model_of(), random_document(200).replace(b"\n", b"")
    (plain,), (reset,) = (document_entropies(model, [document], reset_on_newline=reset) for reset in (False, True))
    assert torch.equal(plain, reset)


def test_edge_documents() -> None:
    model = model_of()
    documents = [b"", b"a", b"\xff\xfe\x80", b"\n", b"\n\n", b"\0" * 50, "über".encode()[:1]]
    for reset in (False, True):
        found = document_entropies(model, documents, reset_on_newline=reset)
        assert [len(entropies) for entropies in found] == [len(document) + 1 for document in documents]
        for entropies in found:
            assert bool(((entropies >= 0) & (entropies <= math.log(260) + 1e-5)).all())
    assert document_entropies(model, []) == []


def test_training_goes_on_after_entropies() -> None:
    """Nothing made under inference mode stays behind in the model."""
    model = model_of()
    document_entropies(model, [random_document(50)])
    assert model.training
    loss = model(with_bos(random_document(50))[None]).sum()
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_refused() -> None:
    with pytest.raises(ValueError, match="row_bytes must be at least 1, got 0"):
        document_entropies(model_of(), [b"a"], row_bytes=0)
    with pytest.raises(ConfigError, match=r"transformer\.window must be set for an entropy model"):
        EntropyModelConfig(transformer=transformer_config(window=None))
