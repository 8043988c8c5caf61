"""Sequences in, one micro-batch of tensors out: the rows padded to the longest, targets beside the ids.

Shapes: B rows, T input bytes, M = T + 1 ids of a row, P patches. Padding: id 0, document -1, target -1, one patch for
all of a row's padding. Python handles the places of documents and padding, numpy all rows' bytes at once.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from blt.loss import NO_TARGET
from blt.step import Batch
from blt.vocabulary import BOE, BOS, BYTE_OFFSET, EOS
from pipelines.train.packing import PackedSequence, Parts


def make_batch(sequences: Sequence[PackedSequence], with_patches: bool) -> Batch:
    """The batch of `sequences`; without any, one row of padding that weighs nothing."""
    if not sequences:
        return _padding_batch(with_patches)
    size = max(len(sequence) for sequence in sequences)
    rows = [(number * size, sequence, sequence.parts()) for number, sequence in enumerate(sequences)]
    bos = [row + place for row, _, parts in rows for place in parts.bos]
    eos = [row + place for row, _, parts in rows for place in parts.eos]
    padding = [place for row, sequence, _ in rows for place in range(row + len(sequence), row + size)]
    context = [place for row, sequence, _ in rows for place in range(row, row + sequence.context)]
    text = np.zeros(len(rows) * size, np.uint8)
    is_byte = np.ones(len(text), np.bool_)
    is_byte[bos + eos + padding] = False
    text[is_byte] = np.concatenate([parts.text for _, _, parts in rows])
    ids = np.add(text, BYTE_OFFSET, dtype=np.int16)
    ids[bos], ids[eos], ids[padding] = BOS, EOS, BOE
    targets = ids.copy()
    targets[bos + padding + context] = NO_TARGET
    return Batch(
        byte_ids_BT=torch.from_numpy(np.ascontiguousarray(ids.reshape(-1, size)[:, :-1])),
        targets_BT=torch.from_numpy(np.ascontiguousarray(targets.reshape(-1, size)[:, 1:])),
        document_ids_BT=_document_ids([(len(sequence), parts) for _, sequence, parts in rows], size - 1),
        patch_lengths_BP=_patch_lengths(sequences, size) if with_patches else None,
    )


def _document_ids(rows: Sequence[tuple[int, Parts]], length: int) -> Tensor:
    """int32 [B,T]: documents and fragments counted in each row, from rows of so many ids."""
    numbers: list[int] = []
    sizes: list[int] = []
    for num_ids, parts in rows:
        edges = [0, *(place for place in parts.bos if place), min(num_ids, length)]
        numbers += (*range(len(edges) - 1), -1)
        sizes += (end - start for start, end in pairwise((*edges, length)))
    return torch.from_numpy(np.repeat(np.asarray(numbers, np.int32), sizes).reshape(-1, length))


def _patch_lengths(sequences: Sequence[PackedSequence], size: int) -> Tensor:
    """int32 [B,P]; a row's padding is one more patch, so that every row sums to `size`."""
    most = max(len(sequence.patch_lengths) for sequence in sequences)
    lengths = np.zeros((len(sequences), most + 2), np.int32)
    lengths[:, 0] = 1
    for row, sequence in zip(lengths, sequences, strict=True):
        end = 1 + len(sequence.patch_lengths)
        row[1:end], row[end] = sequence.patch_lengths, size - len(sequence)
    return torch.from_numpy(lengths)


def _padding_batch(with_patches: bool) -> Batch:
    """One row that weighs nothing."""
    return Batch(
        byte_ids_BT=torch.full((1, 1), BOE, dtype=torch.int16),
        targets_BT=torch.full((1, 1), NO_TARGET, dtype=torch.int16),
        document_ids_BT=torch.full((1, 1), -1, dtype=torch.int32),
        patch_lengths_BP=torch.ones((1, 2), dtype=torch.int32) if with_patches else None,
    )
