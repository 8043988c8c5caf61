"""Patch layout against loops over bytes and patches; everything that is refused, with its message."""

import re
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from blt.patch_layout import patch_layout
from tests import oracle
from tests.model_cases import Batch, packed_batch, plain_batch

NUM_BYTES = st.integers(1, 15)
RATES = st.sampled_from([0.0, 0.2, 1.0])


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    seed, rate, zeros = draw(st.integers(0, 2**20)), draw(RATES), draw(st.integers(0, 3))
    if draw(st.booleans()):
        rows = draw(st.lists(st.lists(NUM_BYTES, max_size=4), min_size=1, max_size=3))
        return packed_batch(
            rows, seed=seed, start_rate=rate, trailing_zeros=zeros, padding=draw(st.integers(0, 2)), alphabet=5
        )
    return plain_batch(
        draw(st.integers(1, 3)), draw(NUM_BYTES), seed=seed, start_rate=rate, trailing_zeros=zeros, eos_rate=0.2
    )


@settings(max_examples=120)
@given(batches())
def test_equals_loops(batch: Batch) -> None:
    layout = patch_layout(batch.byte_ids, batch.patch_lengths, batch.document_ids)
    num_rows, length = batch.byte_ids.shape
    num_patches = batch.patch_lengths.shape[1]
    assert layout.num_patches == num_patches
    for row in range(num_rows):
        patch_of = [p for p, n in enumerate(batch.patch_lengths[row].tolist()) for _ in range(n)]
        flat = [row * num_patches + p for p in patch_of]
        here = slice(row * length, (row + 1) * length)
        assert layout.encoder_patch[here].tolist() == flat[:-1]
        assert layout.decoder_patch[here].tolist() == [p - 1 for p in flat[1:]]
        given_ids = None if batch.document_ids is None else batch.document_ids[row].tolist()
        blocks, positions = oracle.byte_documents(batch.byte_ids[row].tolist(), given_ids)
        assert layout.positions_BT[row].tolist() == positions
        assert same_partition(layout.document_ids_BT[row].tolist(), blocks)
        assert_patches(batch, row, patch_of, layout.patch_document_ids_BP[row], layout.patch_positions_BP[row])


def same_partition(ours: list[int], theirs: list[int]) -> bool:
    """Whether both number the same runs, whatever the numbers."""
    return [a != b for a, b in pairwise(ours)] == [a != b for a, b in pairwise(theirs)]


def assert_patches(batch: Batch, row: int, patch_of: list[int], documents_P: Tensor, positions_P: Tensor) -> None:
    """Patches that hold a document's bytes are numbered as their bytes; the others are read by no byte."""
    byte_ids = batch.byte_ids[row].tolist()
    number, index, before = 0, 0, None
    for patch in range(patch_of[-1] + 1):
        members = [i for i in range(len(byte_ids)) if patch_of[i] == patch]
        if batch.document_ids is None:
            assert (int(documents_P[patch]), int(positions_P[patch])) == (number, patch)
            number += any(byte_ids[i] == 2 for i in members)
        elif members and int(batch.document_ids[row, members[0]]) >= 0:
            document = int(batch.document_ids[row, members[0]])
            index = index + 1 if document == before else 0
            assert int(positions_P[patch]) == index
            joined = patch > 0 and int(documents_P[patch]) == int(documents_P[patch - 1])
            assert joined == (document == before)
            before = document


def ids(*values: int) -> Tensor:
    return torch.tensor([values])


def test_an_id_that_comes_back_is_another_document() -> None:
    byte_ids, lengths = ids(5, 6, 7, 0, 9, 10, 11), ids(1, 1, 2, 1, 1, 1, 1)
    again = patch_layout(byte_ids, lengths, ids(0, 0, 0, -1, 0, 0, 0))
    other = patch_layout(byte_ids, lengths, ids(0, 0, 0, -1, 1, 1, 1))
    assert again.patch_positions_BP.tolist() == other.patch_positions_BP.tolist()
    assert again.patch_document_ids_BP.tolist() == other.patch_document_ids_BP.tolist()


BYTES = ids(5, 6, 7, 8)
REFUSED = {
    "bytes of one dimension": (
        BYTES[0],
        ids(1, 4),
        None,
        "byte_ids must be int64 [B,T] with T >= 1, got torch.int64 [4]",
    ),
    "bytes of floats": (BYTES.float(), ids(1, 4), None, "byte_ids must be int64 [B,T] with T >= 1, got torch.float32"),
    "bytes of int32": (BYTES.int(), ids(1, 4), None, "byte_ids must be int64 [B,T] with T >= 1, got torch.int32"),
    "no bytes": (BYTES[:, :0], ids(1), None, "byte_ids must be int64 [B,T] with T >= 1, got torch.int64 [1, 0]"),
    "lengths of one dimension": (BYTES, ids(1, 4)[0], None, "patch_lengths must be int64 [1,P], got torch.int64 [2]"),
    "lengths of floats": (BYTES, ids(1, 4).float(), None, "patch_lengths must be int64 [1,P], got torch.float32"),
    "lengths of more rows": (BYTES, ids(1, 4).repeat(2, 1), None, "patch_lengths must be int64 [1,P], got"),
    "no patches": (BYTES, ids(1)[:, :0], None, "patch_lengths: the first patch of every row must be one byte long"),
    "first patch of two": (BYTES, ids(2, 3), None, "patch_lengths: the first patch of every row must be one byte long"),
    "first patch of none": (
        BYTES,
        ids(0, 5),
        None,
        "patch_lengths: the first patch of every row must be one byte long",
    ),
    "negative length": (BYTES, ids(1, 5, -1), None, "patch_lengths must not be negative"),
    "sum without the next byte": (
        BYTES,
        ids(1, 3),
        None,
        "patch_lengths must sum to T + 1 = 5 (the next byte included), got sums [4]",
    ),
    "sum too large": (
        BYTES,
        ids(1, 5),
        None,
        "patch_lengths must sum to T + 1 = 5 (the next byte included), got sums [6]",
    ),
    "zero inside": (BYTES, ids(1, 0, 4), None, "patch_lengths: zeros must only trail"),
    "document ids of int32": (
        BYTES,
        ids(1, 4),
        ids(0, 0, 0, 0).int(),
        "document_ids must be int64 [1,4], got torch.int32",
    ),
    "document ids too short": (
        BYTES,
        ids(1, 4),
        ids(0, 0, 0),
        "document_ids must be int64 [1,4], got torch.int64 [1, 3]",
    ),
    "document inside a patch": (
        BYTES,
        ids(1, 3, 1),
        ids(0, 0, 1, 1),
        "document_ids: the document at row 0, byte 2 must open",
    ),
    "document with a long first patch": (
        BYTES,
        ids(1, 1, 3),
        ids(0, 0, 1, 1),
        "the document at row 0, byte 2 must open",
    ),
    "document after padding in its patch": (
        BYTES,
        ids(1, 4),
        ids(0, -1, 1, 1),
        "the document at row 0, byte 2 must open",
    ),
    "last byte a document, next byte in its patch": (
        BYTES,
        ids(1, 2, 2),
        ids(0, 0, 0, 1),
        "the document at row 0, byte 3 must open",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    byte_ids, patch_lengths, document_ids, message = REFUSED[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        patch_layout(byte_ids, patch_lengths, document_ids)


def test_padding_needs_no_opening() -> None:
    """A patch may run from a document into padding: nothing of the document reads it."""
    layout = patch_layout(BYTES, ids(1, 4), ids(0, 0, -1, -1))
    assert layout.decoder_patch.tolist() == [0, 0, 0, 0]
