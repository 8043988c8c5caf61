"""Scoring: a BLT and a row group of patched documents in, the nats that each document cost out.

A document is read in windows of at most S patches and T bytes; a window that does not open its document begins with
context that an earlier window scored. Every byte and EOS is scored once. Shapes: D documents, B rows, T bytes.
"""

import itertools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from blt.loss import NO_TARGET, row_cross_entropy
from blt.model import BLT
from blt.step import Batch
from blt.vocabulary import BYTE_OFFSET
from pipelines.train.batch import make_batch
from pipelines.train.packing import Integers, RowGroup, document_windows, take_sequence

Nats = npt.NDArray[np.float64]


@torch.inference_mode()
def score_documents(
    model: BLT, group: RowGroup, *, sequence_patches: int, sequence_bytes: int, batch_bytes: int
) -> Nats:
    """Nats of each document's bytes and EOS, float64 [D], on whatever device the model is; batches and errors as
    `window_logits`."""
    num_documents = len(group.document_starts)
    nats, targets = np.zeros(num_documents), np.zeros(num_documents, np.int64)
    for windows, batch, logits_BTV in window_logits(model, group, sequence_patches, sequence_bytes, batch_bytes):
        first_scored = group.patch_starts[windows[:, 2]]
        document_of = np.searchsorted(group.document_starts, first_scored, side="right") - 1
        np.add.at(nats, document_of, row_cross_entropy(logits_BTV, batch.targets_BT).cpu().numpy())
        np.add.at(targets, document_of, (batch.targets_BT != NO_TARGET).sum(1).cpu().numpy())
    assert np.array_equal(targets, document_lengths(group) + 1), "every byte and EOS is a target once"
    return nats


def window_logits(
    model: BLT, group: RowGroup, sequence_patches: int, sequence_bytes: int, batch_bytes: int
) -> Iterator[tuple[Integers, Batch, Tensor]]:
    """Batches of windows as `document_windows` gives them, int64 [B,3], with their tensors and logits [B,T,V].

    A row's targets are the ids from the window's first scored patch to its end, in order. Windows of like length share
    a batch of at most `batch_bytes`, padding included. DataError if a patch is longer than a window.
    """
    windows = np.asarray(document_windows(group, sequence_patches, sequence_bytes), np.int64).reshape(-1, 3)
    sizes = group.patch_starts[windows[:, 1]] - group.patch_starts[windows[:, 0]] + 1
    device = next(model.parameters()).device
    for chosen in _batches(sizes, batch_bytes):
        sequences = [take_sequence(group, *windows[number].tolist()) for number in chosen]
        batch = make_batch(sequences, with_patches=True).to(device)
        assert batch.patch_lengths_BP is not None
        yield windows[chosen], batch, model(batch.byte_ids_BT, batch.patch_lengths_BP, batch.document_ids_BT)


def document_lengths(group: RowGroup) -> Integers:
    """Bytes of each document [D]: its ids less BOS and EOS."""
    return np.diff(np.append(group.document_starts, len(group.ids_N))) - 2


def document_patches(group: RowGroup) -> Integers:
    """Patches among the bytes of each document [D]: those of BOS and of an EOS that opens one not counted."""
    ends = np.append(group.document_starts[1:], len(group.ids_N)) - 1
    first = np.searchsorted(group.patch_starts, group.document_starts, side="right")
    return np.searchsorted(group.patch_starts, ends) - first


def document_texts(group: RowGroup) -> list[bytes]:
    """The bytes of each document."""
    borders = np.append(group.document_starts, len(group.ids_N)).tolist()
    parts = [group.ids_N[start + 1 : end - 1] for start, end in itertools.pairwise(borders)]
    return [(ids - BYTE_OFFSET).astype(np.uint8).tobytes() for ids in parts]


def _batches(sizes: Integers, batch_bytes: int) -> Iterator[Integers]:
    """Numbers of windows that are computed together, the longest first."""
    order = np.argsort(-sizes, kind="stable")
    start = 0
    while start < len(order):
        rows = max(1, batch_bytes // int(sizes[order[start]]))
        yield order[start : start + rows]
        start += rows
