"""Sequences in, one micro-batch of tensors out: the rows padded to the longest, targets beside the ids.

Shapes: B rows, T input bytes, P patches. Padding: id 0, document -1, target -1, one patch for all of a row's padding.
"""

from collections.abc import Sequence

import numpy as np
import torch

from blt.loss import NO_TARGET
from blt.step import Batch
from blt.vocabulary import BOE
from pipelines.train.packing import PackedSequence


def make_batch(sequences: Sequence[PackedSequence], with_patches: bool) -> Batch:
    """The batch of `sequences`; without any, one row of padding that weighs nothing."""
    length = max((len(sequence.ids_M) - 1 for sequence in sequences), default=1)
    rows = max(len(sequences), 1)
    ids = np.full((rows, length), BOE, np.int16)
    targets = np.full((rows, length), NO_TARGET, np.int16)
    documents = np.full((rows, length), -1, np.int32)
    for row, sequence in enumerate(sequences):
        given = min(len(sequence.ids_M), length)
        ids[row, :given] = sequence.ids_M[:given]
        targets[row, : len(sequence.ids_M) - 1] = sequence.ids_M[1:]
        targets[row, : max(sequence.context - 1, 0)] = NO_TARGET
        documents[row, :given] = 0
        for number, start in enumerate(sequence.fragment_starts[1:].tolist(), 1):
            documents[row, start:given] = number
            targets[row, start - 1] = NO_TARGET
    return Batch(
        byte_ids_BT=torch.from_numpy(ids),
        targets_BT=torch.from_numpy(targets),
        document_ids_BT=torch.from_numpy(documents),
        patch_lengths_BP=_patch_lengths(sequences, length) if with_patches else None,
    )


def _patch_lengths(sequences: Sequence[PackedSequence], length: int) -> torch.Tensor:
    """int32 [B,P]; a row's padding is one more patch, so that every row sums to length + 1."""
    if not sequences:
        return torch.tensor([[1, length]], dtype=torch.int32)
    lengths = np.zeros((len(sequences), max(len(sequence.patch_lengths) for sequence in sequences) + 1), np.int32)
    for row, sequence in zip(lengths, sequences, strict=True):
        num_patches = len(sequence.patch_lengths)
        row[:num_patches] = sequence.patch_lengths
        row[num_patches] = max(length + 1 - len(sequence.ids_M), 0)
    return torch.from_numpy(lengths)
