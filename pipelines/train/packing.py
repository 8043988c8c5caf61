"""Packing: a row group's documents in, the training sequences cut from them out. Pure; numpy only.

A document is BOS, its bytes, EOS. A sequence holds at most S patches and T input bytes (T + 1 ids, the last of which
is a target only), is cut at patch borders alone and leaves nothing out. A sequence that begins inside a document opens
with the id before its first patch, as a one-byte patch that is input only: so every byte and every EOS of a row group
is a target exactly once, and BOS never.

Shapes: N ids and P patches of a row group, M ids of a sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from blt.errors import DataError
from blt.vocabulary import BOS, BYTE_OFFSET, EOS

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class RowGroup:
    """The ids of a row group's documents one after the other, and their patches."""

    ids_N: npt.NDArray[np.int16]
    patch_starts: Integers
    """Place in ids_N of each patch's first id, and N at the end: [P + 1]."""
    document_starts: Integers
    """Place in ids_N of each BOS."""


@dataclass(frozen=True, kw_only=True)
class PackedSequence:
    """One sequence: M ids, the lengths of its patches (sum M), and the places where a document or fragment begins."""

    ids_M: npt.NDArray[np.int16]
    patch_lengths: Integers
    fragment_starts: Integers
    context: int = 0
    """The first `context` ids are read but are no targets (besides those that open a fragment)."""

    @property
    def num_targets(self) -> int:
        return len(self.ids_M) - max(len(self.fragment_starts), self.context)


def join_documents(text: npt.NDArray[np.uint8], lengths: Integers, starts: Integers | None) -> RowGroup:
    """A row group from its documents' bytes end to end, their lengths, and the places of their patch starts.

    starts: places among the n + 1 ids of each document (its bytes and EOS) end to end; None = every byte is a patch.
    """
    document_starts = np.cumsum(lengths + 2) - (lengths + 2)
    total = int((lengths + 2).sum())
    ids = _join_ids(text, lengths, document_starts, total)
    if starts is None:
        return RowGroup(ids_N=ids, patch_starts=np.arange(total + 1), document_starts=document_starts)
    borders = np.searchsorted(starts, document_starts - np.arange(len(lengths)))  # without a BOS for each document
    within = starts + np.repeat(np.arange(1, len(lengths) + 1), np.diff(np.append(borders, len(starts))))
    patch_starts = np.append(np.insert(within, borders, document_starts), total)
    return RowGroup(ids_N=ids, patch_starts=patch_starts, document_starts=document_starts)


def _join_ids(
    text: npt.NDArray[np.uint8], lengths: Integers, document_starts: Integers, total: int
) -> npt.NDArray[np.int16]:
    ids = np.empty(total, np.int16)
    ids[document_starts], ids[document_starts + lengths + 1] = BOS, EOS
    sources = (np.cumsum(lengths) - lengths).tolist()
    for source, target, length in zip(sources, (document_starts + 1).tolist(), lengths.tolist(), strict=True):
        np.add(text[source : source + length], BYTE_OFFSET, out=ids[target : target + length], dtype=np.int16)
    return ids


def cut_sequences(group: RowGroup, max_patches: int | None, max_bytes: int) -> Integers:
    """First patch of each sequence, and P at the end. DataError if a patch is longer than max_bytes."""
    starts, num_patches = group.patch_starts, len(group.patch_starts) - 1
    _check_patches_fit(starts, max_bytes)
    opens_document = np.zeros(num_patches, np.bool_)
    opens_document[np.searchsorted(starts, group.document_starts)] = True
    cuts, patch = [0], 0
    while patch < num_patches:
        repeated = 0 if opens_document[patch] else 1
        fits = int(np.searchsorted(starts, starts[patch] + max_bytes + 1 - repeated, side="right")) - 1
        patch = fits if max_patches is None else min(fits, patch + max_patches - repeated)
        cuts.append(patch)
    return np.asarray(cuts, np.int64)


def take_sequence(group: RowGroup, first_patch: int, end_patch: int, scored_from: int | None = None) -> PackedSequence:
    """The sequence of patches [first_patch, end_patch); targets begin at patch `scored_from` if given."""
    first, end = int(group.patch_starts[first_patch]), int(group.patch_starts[end_patch])
    lo, hi = group.document_starts.searchsorted((first, end)).tolist()
    inside, borders = group.document_starts[lo:hi], group.patch_starts[first_patch : end_patch + 1]
    lengths = borders[1:] - borders[:-1]
    if len(inside) == 0 or inside[0] != first:
        first -= 1
        inside = np.concatenate(([first], inside))
        lengths = np.concatenate(([1], lengths))
    context = 0 if scored_from is None else int(group.patch_starts[scored_from]) - first
    return PackedSequence(
        ids_M=group.ids_N[first:end], patch_lengths=lengths, fragment_starts=inside - first, context=context
    )


def document_windows(group: RowGroup, max_patches: int, max_bytes: int) -> Sequence[tuple[int, int, int]]:
    """Windows (first patch, end patch, first scored patch) that score every patch but BOS once, each document apart.

    About half of a window that does not open its document is context, which an earlier window scored: as many patches
    as fit half of either limit. It gives way where the next patch would not fit. At most max_patches patches and
    max_bytes input bytes, as in training. DataError if a patch is longer than max_bytes.
    """
    windows = []
    starts = group.patch_starts
    _check_patches_fit(starts, max_bytes)
    borders = np.append(np.searchsorted(starts, group.document_starts), len(starts) - 1)
    for first_of_document, end_of_document in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True):
        scored = first_of_document + 1  # BOS is no target; a window of BOS alone would have none
        while scored < end_of_document:
            near = int(np.searchsorted(starts, starts[scored] - max_bytes // 2))
            first = max(first_of_document, scored - max(max_patches // 2 - 1, 0), near)
            end = _end_of_window(starts, first, max_patches, max_bytes)
            if end <= scored:
                first, end = scored, _end_of_window(starts, scored, max_patches, max_bytes)
            windows.append((first, min(end, end_of_document), scored))
            scored = min(end, end_of_document)
    return windows


def _check_patches_fit(patch_starts: Integers, max_bytes: int) -> None:
    longest = int(np.diff(patch_starts).max(initial=0))
    if longest > max_bytes:
        raise DataError(f"a patch of {longest} bytes does not fit a sequence of {max_bytes} bytes")


def _end_of_window(starts: Integers, first: int, max_patches: int, max_bytes: int) -> int:
    """End of the longest run of patches from `first`, one patch spared for the byte that opens a fragment."""
    fits = int(np.searchsorted(starts, starts[first] + max_bytes, side="right")) - 1
    return min(fits, first + max_patches - 1)
