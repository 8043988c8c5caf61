"""A passage of text laid out for reading: what to show for each byte, in which patch it is, and its entropy curve.

In: a `Passage` and its entropies. Out: words of pieces, each piece a run of cells in one patch with the part of the
curve that belongs under it. Widths are in columns of a monospace font, so text and curve cannot come apart.
"""

import itertools
import math
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jobs.report_patches import Passage

NUM_COLOURS = 4
"""Patches take these many colours in turn."""
CURVE_HEIGHT = 100
"""Units from 0 nats to the top of the scale."""
COLUMN_WIDTH = 10
"""Units of the curve's x axis in a column of text."""
_PIECE_COLUMNS = 24
"""Longest run of columns that is kept in one line."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One character that is shown as it is, or one byte that is shown as hexadecimal digits or as a symbol."""

    shown: str
    kind: str
    """"text", "hex" or "symbol"."""
    first: int
    """Index of its first byte in the passage."""
    num_bytes: int
    columns: int
    title: str
    """For the pointer: byte, entropy, patch length."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Cells of one patch that stay in one line."""

    cells: tuple[Cell, ...]
    colour: int
    opens: bool
    """Whether its first byte starts the patch."""
    closes: bool
    columns: int
    curve: str
    """Points "x,y x,y ..." of the entropy curve; those outside 0..columns lead over to the neighbours."""
    peaks: str
    """Path of the points above the threshold."""
    ends_line: bool


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The passage in words; a word is a tuple of pieces that are not parted at a line's end."""

    words: tuple[tuple[Piece, ...], ...]
    top_nats: float
    """Entropy at the top of the curve's scale; 0 without entropies."""
    threshold_share: float | None
    """Height of the threshold on that scale, 0 to 1; None if there is none to show."""


def lay_out(passage: Passage, entropies: Sequence[float] | None, threshold: float | None) -> Layout:
    """Lay out a passage; `entropies` (nats) are of the distributions that its bytes were drawn from, one per byte."""
    cells = list(_cells(passage, entropies))
    top = _scale(entropies, threshold)
    curve = _Curve(cells, entropies, threshold, top)
    patch_of = list(itertools.accumulate(passage.starts))
    pieces = [_piece(passage, group, curve, patch_of) for group in _pieces(cells, passage.starts)]
    share = threshold / top if threshold is not None and entropies and 0 <= threshold <= top else None
    return Layout(words=tuple(_words(pieces)), top_nats=top, threshold_share=share)


class _Curve:
    """The curve of the whole passage; x runs on over line ends."""

    def __init__(
        self, cells: Sequence[Cell], entropies: Sequence[float] | None, threshold: float | None, top: float
    ) -> None:
        self._entropies, self._threshold, self._top = entropies or (), threshold, top
        self.x: list[float] = []
        self.column_of: dict[int, int] = {}
        column = 0
        for cell in cells:
            self.column_of[cell.first] = column
            step = cell.columns / cell.num_bytes
            self.x += [COLUMN_WIDTH * (column + (i + 0.5) * step) for i in range(cell.num_bytes)]
            column += cell.columns

    def points(self, first: int, last: int) -> str:
        """From the byte before `first` to the byte after the last one, x relative to the cell at `first`."""
        shown = range(max(first - 1, 0), min(last + 1, len(self._entropies)))
        return " ".join(f"{self._left(i, first)},{self._y(i)}" for i in shown)

    def peaks(self, first: int, last: int) -> str:
        if self._threshold is None or not self._entropies:
            return ""
        above = (i for i in range(first, last) if self._entropies[i] > self._threshold)
        return "".join(f"M{self._left(i, first)},{self._y(i)}h0" for i in above)

    def _left(self, index: int, first: int) -> str:
        return f"{self.x[index] - COLUMN_WIDTH * self.column_of[first]:g}"

    def _y(self, index: int) -> str:
        return f"{CURVE_HEIGHT * (1 - self._entropies[index] / self._top):.0f}"


def _scale(entropies: Sequence[float] | None, threshold: float | None) -> float:
    """Top of the scale: the next half nat above everything that is shown."""
    if not entropies:
        return 0.0
    return max(math.ceil(2.1 * max(*entropies, threshold or 0.0)) / 2, 0.5)


def _cells(passage: Passage, entropies: Sequence[float] | None) -> Iterator[Cell]:
    """One cell for each character, or for each byte of what is no character that can be shown."""
    text, starts = passage.text, passage.starts
    lengths = _patch_length_at(starts)
    index = 0
    while index < len(text):
        size = _character_bytes(text, index)
        if any(starts[index + 1 : index + size]):
            size = 1
        shown, kind, columns = _shown(text[index : index + size])
        figures = [f"{entropies[i]:.2f}" for i in range(index, index + size)] if entropies else []
        title = f"{_name(text[index : index + size])} at {passage.offset + index}"
        title += f" · {' '.join(figures)} nats" if figures else ""
        title += f" · patch of {lengths[index]} byte{'s' if lengths[index] > 1 else ''}"
        yield Cell(shown=shown, kind=kind, first=index, num_bytes=size, columns=columns, title=title)
        index += size


def _patch_length_at(starts: Sequence[bool]) -> list[int]:
    """For each byte the length of its patch."""
    borders = [i for i, starts_patch in enumerate(starts) if starts_patch or i == 0]
    lengths = [after - first for first, after in itertools.pairwise([*borders, len(starts)])]
    return [length for length in lengths for _ in range(length)]


def _character_bytes(text: bytes, index: int) -> int:
    """Length of the UTF-8 character at `index`; 1 if there is none."""
    lead = text[index]
    size = 1 if lead < 0xC2 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
    try:
        text[index : index + size].decode()
    except UnicodeDecodeError:
        return 1
    return size


def _shown(data: bytes) -> tuple[str, str, int]:
    """Text, kind and columns of one character or byte. Marks that would join their neighbour are shown as bytes."""
    if data in (b"\n", b"\t"):
        return ("↵" if data == b"\n" else "⇥"), "symbol", 1
    character = data.decode(errors="replace")
    if character == "\ufffd" or (character != " " and unicodedata.category(character)[0] in "CMZ"):
        return data.hex(" ").upper(), "hex", 3 * len(data)
    return character, "text", len(data)


def _name(data: bytes) -> str:
    digits = "0x" + data.hex().upper()
    shown, kind, _ = _shown(data)
    return f"{digits} “{shown}”" if kind == "text" else digits


def _pieces(cells: Sequence[Cell], starts: Sequence[bool]) -> Iterator[list[Cell]]:
    """Cut where a patch starts, after a space or newline, and before a piece gets too wide for a line."""
    held: list[Cell] = []
    for cell in cells:
        wide = sum(c.columns for c in held) + cell.columns > _PIECE_COLUMNS
        if held and (starts[cell.first] or wide or held[-1].shown in (" ", "↵")):
            yield held
            held = []
        held.append(cell)
    if held:
        yield held


def _piece(passage: Passage, cells: Sequence[Cell], curve: _Curve, patch_of: Sequence[int]) -> Piece:
    first, last = cells[0].first, cells[-1].first + cells[-1].num_bytes
    return Piece(
        cells=tuple(cells),
        colour=patch_of[first] % NUM_COLOURS,
        opens=passage.starts[first],
        closes=last == len(passage.text) or passage.starts[last],
        columns=sum(cell.columns for cell in cells),
        curve=curve.points(first, last),
        peaks=curve.peaks(first, last),
        ends_line=passage.text[last - 1 : last] == b"\n",
    )


def _words(pieces: Sequence[Piece]) -> Iterator[tuple[Piece, ...]]:
    held: list[Piece] = []
    for piece in pieces:
        if held and sum(p.columns for p in held) + piece.columns > _PIECE_COLUMNS:
            yield tuple(held)
            held = []
        held.append(piece)
        if piece.cells[-1].shown in (" ", "↵"):
            yield tuple(held)
            held = []
    if held:
        yield tuple(held)
