"""Packing: a row group's documents in, the training sequences cut from them out. Pure; numpy only.

A document is BOS, its bytes, EOS. A sequence holds at most S patches and T input bytes (T + 1 ids, the last of which
is a target only), is cut at patch borders alone and leaves nothing out. A sequence that begins inside a document opens
with the id before its first patch, as a one-byte patch that is input only: so every byte and every EOS of a row group
is a target exactly once, and BOS never.

Shapes: N places of a row group, one for each id; D documents.
"""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from blt.errors import DataError

Integers = npt.NDArray[np.int64]

_UNPACKED_PLACES = 2**17
"""Patch starts are unpacked for about as many places at once: few calls, and arrays that fit a core's cache."""


@dataclass(frozen=True, kw_only=True)
class RowGroup:
    """The documents of a row group one after the other, each with a place for its BOS, its bytes and its EOS."""

    text: npt.NDArray[np.uint8]
    """The documents' bytes end to end: N - 2 D."""
    borders: list[int]
    """Place of each document's BOS, and N at the end: D + 1."""
    bits: npt.NDArray[np.uint8] | None
    """The documents' patch starts end to end, as they are stored; None: every byte is a patch."""
    bit_borders: list[int]
    """Where in `bits` each document's begin, and its length: D + 1."""

    def patch_starts(self, first: int, end: int) -> Integers:
        """Places of the first ids of the patches of documents [first, end)."""
        begin = self.borders[first]
        if self.bits is None:
            return np.arange(begin, self.borders[end])
        unpacked = np.unpackbits(self.bits[self.bit_borders[first] : self.bit_borders[end]], bitorder="little").data
        pieces: list[bytes | memoryview] = [b""]
        for document in range(first, end):
            start = 8 * (self.bit_borders[document] - self.bit_borders[first])
            pieces.append(unpacked[start : start + self.borders[document + 1] - self.borders[document] - 1])
        return np.flatnonzero(np.frombuffer(b"\1".join(pieces), np.bool_)) + begin  # BOS is a patch


class Parts(NamedTuple):
    """What the ids of a sequence are made of."""

    text: npt.NDArray[np.uint8]
    """Its bytes."""
    bos: list[int]
    """Places of BOS, counted from the sequence's first."""
    eos: list[int]
    """Places of EOS; all other places hold the bytes in turn."""

    def runs(self, num_ids: int) -> Iterator[tuple[int, int]]:
        """First place and end of each document's or fragment's bytes, of a sequence of so many ids."""
        begins = [place + 1 for place in self.bos]
        if not self.bos or self.bos[0] > 0:
            begins.insert(0, 0)
        return zip_longest(begins, self.eos, fillvalue=num_ids)


@dataclass(frozen=True, slots=True)
class PackedSequence:
    """The ids at places [begin, end) of a row group; the first of them is a patch of its own."""

    group: RowGroup
    begin: int
    end: int
    patch_lengths: npt.NDArray[np.integer]
    """Of all patches but the first."""
    context: int = 0
    """The first `context` ids are read but are no targets (nor is the first, nor any BOS)."""

    def __len__(self) -> int:
        return self.end - self.begin

    @property
    def num_patches(self) -> int:
        """Patches whose bytes are targets: not the first, and no BOS."""
        borders = self.group.borders
        return len(self.patch_lengths) - bisect_left(borders, self.end) + bisect_left(borders, self.begin + 1)

    def parts(self) -> Parts:
        """Its bytes, and where among them special ids stand."""
        borders, begin = self.group.borders, self.begin
        first = bisect_left(borders, begin)
        inside = [border - begin for border in borders[first : bisect_left(borders, self.end + 1, first)]]
        bos = inside[:-1] if inside and inside[-1] == len(self) else inside
        eos = [place - 1 for place in inside if place]
        start = begin - 2 * first + (not bos or bos[0] > 0)  # less a BOS and an EOS for each document before
        return Parts(self.group.text[start : start + len(self) - len(bos) - len(eos)], bos, eos)


def cut_sequences(group: RowGroup, max_patches: int | None, max_bytes: int) -> Iterator[PackedSequence]:
    """The sequences of a row group in order, each cut when it is asked for.

    DataError at a patch longer than max_bytes.
    """
    borders, num_documents = group.borders, len(group.borders) - 1
    patch = document = known = 0  # the next sequence's first patch; its document; documents whose patches are known
    starts = np.asarray(borders[:1])  # of the patches that are known, and their end
    lengths = np.diff(starts)
    while (first := int(starts[patch])) < borders[-1]:
        if starts[-1] <= first + max_bytes and known < num_documents:
            more = min(bisect_left(borders, first + max_bytes + _UNPACKED_PLACES, known + 1), num_documents)
            starts = np.concatenate((starts[patch:-1], group.patch_starts(known, more), borders[more : more + 1]))
            lengths = np.diff(starts).astype(np.min_scalar_type(max_bytes))
            patch, known = 0, more
        document = bisect_left(borders, first, document)
        begin = first if borders[document] == first else first - 1
        end = int(starts.searchsorted(begin + max_bytes + 1, side="right")) - 1
        if max_patches is not None:
            end = min(end, patch + max_patches - (first - begin))
        if end == patch:
            raise _does_not_fit(int(starts[patch + 1]) - first, max_bytes)
        yield PackedSequence(group, begin, int(starts[end]), lengths[patch + (begin == first) : end])
        patch = end


def document_windows(group: RowGroup, max_patches: int, max_bytes: int) -> Iterator[PackedSequence]:
    """Sequences that score every patch but BOS once, each document apart.

    About half of a window that does not open its document is context, which an earlier window scored: as many patches
    as fit half of either limit. It gives way where the next patch would not fit. At most max_patches patches and
    max_bytes input bytes, as in training. DataError if a patch is longer than max_bytes.
    """
    starts = np.append(group.patch_starts(0, len(group.borders) - 1), group.borders[-1])
    lengths = np.diff(starts)
    if lengths.max(initial=0) > max_bytes:
        raise _does_not_fit(int(lengths.max()), max_bytes)
    patches = np.searchsorted(starts, group.borders).tolist()
    for first_of_document, end_of_document in pairwise(patches):
        scored = first_of_document + 1  # BOS is no target; a window of BOS alone would have none
        while scored < end_of_document:
            near = int(np.searchsorted(starts, starts[scored] - max_bytes // 2))
            first = max(first_of_document, scored - max(max_patches // 2 - 1, 0), near)
            end = _end_of_window(starts, first, max_patches, max_bytes)
            if end <= scored:
                first, end = scored, _end_of_window(starts, scored, max_patches, max_bytes)
            end, opens = min(end, end_of_document), first == first_of_document
            begin = int(starts[first]) - (not opens)
            yield PackedSequence(
                group, begin, int(starts[end]), lengths[first + opens : end], context=int(starts[scored]) - begin
            )
            scored = end


def _end_of_window(starts: Integers, first: int, max_patches: int, max_bytes: int) -> int:
    """End of the longest run of patches from `first`, one patch spared for the byte that opens a fragment."""
    fits = int(np.searchsorted(starts, starts[first] + max_bytes, side="right")) - 1
    return min(fits, first + max_patches - 1)


def _does_not_fit(patch_bytes: int, max_bytes: int) -> DataError:
    return DataError(f"a patch of {patch_bytes} bytes does not fit a sequence of {max_bytes} bytes")
