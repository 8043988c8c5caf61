"""Scoring: a BLT and a row group of patched documents in, the nats and hits of each document out.

A document is read in windows of at most S patches and T bytes; a window that does not open its document begins with
context that an earlier window scored. Every byte and EOS is scored once. Shapes: D documents, B rows, T bytes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from blt.loss import NO_TARGET, row_cross_entropy, row_hits
from blt.model import BLT
from pipelines.train.batch import make_batch
from pipelines.train.packing import Integers, RowGroup, document_windows, take_sequence

Nats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class DocumentScores:
    """What a model makes of each of some documents."""

    nats: Nats
    """Of the bytes and the EOS: [D]."""
    hits: Integers
    """Bytes that were the most likely next id: [D]."""


@torch.inference_mode()
def score_documents(
    model: BLT, group: RowGroup, *, sequence_patches: int, sequence_bytes: int, batch_bytes: int
) -> DocumentScores:
    """The scores of each document, on whatever device the model is.

    Windows of like length share a batch of at most `batch_bytes`, padding included. DataError if a patch is longer
    than a window.
    """
    windows = np.asarray(document_windows(group, sequence_patches, sequence_bytes), np.int64).reshape(-1, 3)
    num_documents = len(group.document_starts)
    nats = np.zeros(num_documents)
    hits, targets = np.zeros(num_documents, np.int64), np.zeros(num_documents, np.int64)
    document_of = np.searchsorted(group.document_starts, group.patch_starts[windows[:, 2]], side="right") - 1
    sizes = group.patch_starts[windows[:, 1]] - group.patch_starts[windows[:, 0]] + 1
    device = next(model.parameters()).device
    for chosen in _batches(sizes, batch_bytes):
        sequences = [take_sequence(group, *windows[number].tolist()) for number in chosen]
        batch = make_batch(sequences, with_patches=True).to(device)
        assert batch.patch_lengths_BP is not None
        logits_BTV = model(batch.byte_ids_BT, batch.patch_lengths_BP, batch.document_ids_BT)
        np.add.at(nats, document_of[chosen], row_cross_entropy(logits_BTV, batch.targets_BT).cpu().numpy())
        np.add.at(hits, document_of[chosen], row_hits(logits_BTV, batch.targets_BT).cpu().numpy())
        np.add.at(targets, document_of[chosen], (batch.targets_BT != NO_TARGET).sum(1).cpu().numpy())
    assert np.array_equal(targets, document_lengths(group) + 1), "every byte and EOS is a target once"
    return DocumentScores(nats=nats, hits=hits)


def document_lengths(group: RowGroup) -> Integers:
    """Bytes of each document [D]: its ids less BOS and EOS."""
    return np.diff(np.append(group.document_starts, len(group.ids_N))) - 2


def document_patches(group: RowGroup) -> Integers:
    """Patches among the bytes of each document [D]: those of BOS and of an EOS that opens one not counted."""
    ends = np.append(group.document_starts[1:], len(group.ids_N)) - 1
    first = np.searchsorted(group.patch_starts, group.document_starts, side="right")
    return np.searchsorted(group.patch_starts, ends) - first


def document_one_byte_patches(group: RowGroup) -> Integers:
    """Patches of one byte among those of each document [D], EOS not counted to the last one."""
    ends = np.append(group.document_starts[1:], len(group.ids_N)) - 1
    borders = np.union1d(group.patch_starts, ends)  # a document's last patch ends before its EOS
    alone = borders[:-1][np.diff(borders) == 1]
    alone = alone[~np.isin(alone, np.concatenate((group.document_starts, ends)))]
    return np.searchsorted(alone, ends) - np.searchsorted(alone, group.document_starts)


def _batches(sizes: Integers, batch_bytes: int) -> Iterator[Integers]:
    """Numbers of windows that are computed together, the longest first."""
    order = np.argsort(-sizes, kind="stable")
    start = 0
    while start < len(order):
        rows = max(1, batch_bytes // int(sizes[order[start]]))
        yield order[start : start + rows]
        start += rows
