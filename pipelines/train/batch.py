"""Sequences in, one micro-batch of tensors out: the rows padded to the longest, targets beside the ids.

Shapes: B rows, T input bytes, M = T + 1 ids of a row, P patches. Padding: id 0, document -1, target -1, one patch for
all of a row's padding. Python handles the places of documents and padding, numpy their bytes.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from blt.loss import NO_TARGET
from blt.step import Batch
from blt.vocabulary import BOE, BOS, BYTE_OFFSET, EOS
from pipelines.train.packing import PackedSequence


def make_batch(sequences: Sequence[PackedSequence], with_patches: bool) -> Batch:
    """The batch of `sequences`; without any, one row of padding that weighs nothing."""
    if not sequences:
        return _padding_batch(with_patches)
    size = max(len(sequence) for sequence in sequences)
    shape = (len(sequences), size)
    ids, documents = np.zeros(shape, np.int16), np.full(shape, -1, np.int32)
    rows = [(sequence, sequence.parts()) for sequence in sequences]
    for row, (sequence, parts) in zip(ids, rows, strict=True):
        read = 0
        for begin, end in parts.runs(len(sequence)):
            row[begin:end] = parts.text[read : read + end - begin]
            read += end - begin
    ids += BYTE_OFFSET
    targets = ids.copy()
    for i, (sequence, parts) in enumerate(rows):
        for place in parts.eos:
            ids[i, place] = targets[i, place] = EOS
        for place in parts.bos:
            ids[i, place], targets[i, place] = BOS, NO_TARGET
        ids[i, len(sequence) :], targets[i, len(sequence) :] = BOE, NO_TARGET
        targets[i, : sequence.context] = NO_TARGET
        for number, (begin, end) in enumerate(pairwise((0, *(p for p in parts.bos if p), len(sequence)))):
            documents[i, begin:end] = number
    return Batch(
        byte_ids_BT=torch.from_numpy(ids)[:, :-1],
        targets_BT=torch.from_numpy(targets)[:, 1:],
        document_ids_BT=torch.from_numpy(documents)[:, :-1],
        patch_lengths_BP=_patch_lengths(sequences, size) if with_patches else None,
    )


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
