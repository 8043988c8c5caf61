"""Scoring: a BLT and a row group of patched documents in, the nats and hits of each document out.

A document is read in windows of at most S patches and T bytes; a window that does not open its document begins with
context that an earlier window scored. Every byte and EOS is scored once. Shapes: D documents, B rows, T bytes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from blt.loss import NO_TARGET, row_cross_entropy, row_hits
from blt.model import BLT
from blt.step import Batch
from pipelines.train.batch import make_batch
from pipelines.train.packing import Integers, PackedSequence, RowGroup, document_windows

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
    """The scores of each document, on whatever device the model is; batches and errors as `window_logits`."""
    num_documents = len(group.borders) - 1
    nats = np.zeros(num_documents)
    hits, targets = np.zeros(num_documents, np.int64), np.zeros(num_documents, np.int64)
    for windows, batch, logits_BTV in window_logits(model, group, sequence_patches, sequence_bytes, batch_bytes):
        document_of = np.searchsorted(group.borders, [window.begin for window in windows], side="right") - 1
        np.add.at(nats, document_of, row_cross_entropy(logits_BTV, batch.targets_BT).cpu().numpy())
        np.add.at(hits, document_of, row_hits(logits_BTV, batch.targets_BT).cpu().numpy())
        np.add.at(targets, document_of, (batch.targets_BT != NO_TARGET).sum(1).cpu().numpy())
    assert np.array_equal(targets, document_lengths(group) + 1), "every byte and EOS is a target once"
    return DocumentScores(nats=nats, hits=hits)


def window_logits(
    model: BLT, group: RowGroup, sequence_patches: int, sequence_bytes: int, batch_bytes: int
) -> Iterator[tuple[list[PackedSequence], Batch, Tensor]]:
    """Batches of windows as `document_windows` gives them, with their tensors and logits [B,T,V].

    A row's targets are the ids of its window from `scored_from` on, in order. Windows of like length share a batch of
    at most `batch_bytes`, padding included. DataError if a patch is longer than a window.
    """
    windows = list(document_windows(group, sequence_patches, sequence_bytes))
    sizes = np.asarray([len(window) for window in windows], np.int64)
    device = next(model.parameters()).device
    for numbers in _batches(sizes, batch_bytes):
        chosen = [windows[number] for number in numbers]
        batch = make_batch(chosen, with_patches=True).to(device)
        assert batch.patch_lengths_BP is not None
        yield chosen, batch, model(batch.byte_ids_BT, batch.patch_lengths_BP, batch.document_ids_BT)


def scored_from(window: PackedSequence) -> int:
    """Place in its row group of the first id that a window scores: not that which opens it, nor its context."""
    return window.begin + max(window.context, 1)


def document_lengths(group: RowGroup) -> Integers:
    """Bytes of each document [D]: its ids less BOS and EOS."""
    return np.diff(group.borders) - 2


def document_patches(group: RowGroup) -> Integers:
    """Patches among the bytes of each document [D]: those of BOS and of an EOS that opens one not counted."""
    starts = group.patch_starts(0, len(group.borders) - 1)
    eos = np.asarray(group.borders[1:], np.int64) - 1
    return np.searchsorted(starts, eos) - np.searchsorted(starts, group.borders[:-1], side="right")


def document_one_byte_patches(group: RowGroup) -> Integers:
    """Patches of one byte among those of each document [D], EOS not counted to the last one."""
    bos, eos = np.asarray(group.borders[:-1], np.int64), np.asarray(group.borders[1:], np.int64) - 1
    starts = group.patch_starts(0, len(group.borders) - 1)
    borders = np.union1d(starts, eos)  # a document's last patch ends before its EOS
    alone = borders[:-1][np.diff(borders) == 1]
    alone = alone[~np.isin(alone, np.concatenate((bos, eos)))]
    return np.searchsorted(alone, eos) - np.searchsorted(alone, bos)


def _batches(sizes: Integers, batch_bytes: int) -> Iterator[Integers]:
    """Numbers of windows that are computed together, the longest first."""
    order = np.argsort(-sizes, kind="stable")
    start = 0
    while start < len(order):
        rows = max(1, batch_bytes // int(sizes[order[start]]))
        yield order[start : start + rows]
        start += rows
