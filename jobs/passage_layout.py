"""A passage of text laid out for reading: what to show for each byte, in which patch it is, and its entropy curve.

In: bytes, where patches start, and entropies. Out: words of cells; a cell is a character, or a byte that is none.
Widths are in columns of a monospace font, so text and curve cannot come apart. Patches colour bytes and have no say in
the cells and words, so other patches of the same text change colours alone.
"""

import itertools
import math
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from blt.vocabulary import VOCABULARY_SIZE

NUM_COLOURS = 4
"""Patches take these many colours in turn."""
CURVE_HEIGHT = 100
"""Units from 0 nats to the top of the scale."""
COLUMN_WIDTH = 10
"""Units of the curve's x axis in a column of text."""
_HEX_COLUMNS = 3
_WORD_COLUMNS = 24
"""Longest run of columns that is kept in one line."""
_MOST_NATS = math.log(VOCABULARY_SIZE)


@dataclass(frozen=True, kw_only=True)
class ByteCell:
    """One byte of the passage: its patch, and what to tell of it."""

    index: int
    """In the passage."""
    colour: int
    opens: bool
    """Whether it starts a patch."""
    closes: bool
    """Whether its patch ends with it."""
    title: str
    """For the pointer: byte, place, entropy, patch length."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One character that is shown as it is, or one byte that is shown as hexadecimal digits or as a symbol."""

    shown: str
    kind: Literal["text", "hex", "symbol"]
    columns: int
    bytes: tuple[ByteCell, ...]
    """Several only of a character; each has a column of its own."""


@dataclass(frozen=True, kw_only=True)
class Word:
    """Cells that are not parted at a line's end."""

    cells: tuple[Cell, ...]
    columns: int
    curve: str
    """Points "x,y x,y ..." of the entropy curve, one for each byte; those outside 0..columns lead over to the bytes
    before and after. Empty without entropies."""
    peaks: str
    """Path of the points above the threshold."""
    ends_line: bool


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The passage in words."""

    words: tuple[Word, ...]
    top_nats: float
    """Entropy at the top of the curve's scale; 0 without entropies."""
    threshold_share: float | None
    """Height of the threshold on that scale, 0 to 1; None if there is none to show."""


def lay_out(
    text: bytes,
    starts: Sequence[bool],
    entropies: Sequence[float] | None,
    threshold: float | None,
    *,
    offset: int = 0,
) -> Layout:
    """Lay out a passage: `starts` says of each byte whether it starts a patch; `entropies` (nats) are of the
    distributions that the bytes were drawn from, one for each. `offset`: of the first byte, where bytes are counted.
    """
    shown = threshold if threshold is not None and entropies and 0 <= threshold <= _MOST_NATS else None
    top = max(math.ceil(2.1 * max(max(entropies), shown or 0.0)) / 2, 0.5) if entropies else 0.0
    cells = list(_Bytes(text, starts, entropies, offset).cells())
    curve = _Curve(cells, entropies, shown, top)
    words = tuple(_word(group, curve) for group in _words(cells))
    return Layout(words=words, top_nats=top, threshold_share=shown / top if shown is not None else None)


class _Curve:
    """The curve of the whole passage; x runs on over line ends."""

    def __init__(
        self, cells: Sequence[Cell], entropies: Sequence[float] | None, threshold: float | None, top: float
    ) -> None:
        self._entropies, self._threshold, self._top = entropies or (), threshold, top
        self._x: list[float] = []
        self._column_of: dict[int, int] = {}
        column = 0
        for cell in cells:
            self._column_of[cell.bytes[0].index] = column
            step = cell.columns / len(cell.bytes)
            self._x += [COLUMN_WIDTH * (column + (i + 0.5) * step) for i in range(len(cell.bytes))]
            column += cell.columns

    def points(self, first: int, last: int) -> str:
        """From the byte before `first` to the byte after the last one, x relative to the cell at `first`."""
        shown = range(max(first - 1, 0), min(last + 1, len(self._entropies)))
        return " ".join(f"{self._left(i, first)},{self._y(i)}" for i in shown)

    def peaks(self, first: int, last: int) -> str:
        if self._threshold is None:
            return ""
        above = (i for i in range(first, last) if self._entropies[i] > self._threshold)
        return "".join(f"M{self._left(i, first)},{self._y(i)}h0" for i in above)

    def _left(self, index: int, first: int) -> str:
        return f"{self._x[index] - COLUMN_WIDTH * self._column_of[first]:g}"

    def _y(self, index: int) -> str:
        return f"{CURVE_HEIGHT * (1 - self._entropies[index] / self._top):.0f}"


class _Bytes:
    """The passage byte by byte."""

    def __init__(self, text: bytes, starts: Sequence[bool], entropies: Sequence[float] | None, offset: int) -> None:
        self._text, self._starts, self._entropies, self._offset = text, starts, entropies, offset
        self._lengths = patch_length_at(starts)
        self._patch_of = list(itertools.accumulate(starts))

    def cells(self) -> Iterator[Cell]:
        """One cell for each character, or for each byte of what is no character that can be shown."""
        index = 0
        while index < len(self._text):
            character = self._text[index : index + _character_bytes(self._text, index)]
            shown, kind = _shown(character)
            size = len(character) if kind == "text" else 1
            yield Cell(
                shown=shown,
                kind=kind,
                columns=_HEX_COLUMNS if kind == "hex" else size,
                bytes=tuple(self._byte(i, shown if kind == "text" else "", size) for i in range(index, index + size)),
            )
            index += size

    def _byte(self, index: int, character: str, size: int) -> ByteCell:
        """`character`: that it is, or is one of `size` bytes of; empty for none."""
        of = f"{' of' if size > 1 else ''} “{character}”" if character else ""
        figures = f" · {self._entropies[index]:.3f} nats" if self._entropies else ""
        length = self._lengths[index]
        return ByteCell(
            index=index,
            colour=self._patch_of[index] % NUM_COLOURS,
            opens=self._starts[index],
            closes=index + 1 == len(self._text) or self._starts[index + 1],
            # The patch stands last: a page that cuts the text again replaces it.
            title=f"0x{self._text[index]:02X}{of} at {self._offset + index}{figures} · "
            f"patch of {length} byte{'s' if length > 1 else ''}",
        )


def patch_length_at(starts: Sequence[bool]) -> list[int]:
    """For each byte the length of its patch, in bytes; the first byte opens one in any case."""
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


def _shown(data: bytes) -> tuple[str, Literal["text", "hex", "symbol"]]:
    """A character, or the first byte of what is not shown as one: controls, marks that would join their neighbour."""
    if data in (b"\n", b"\t"):
        return ("↵" if data == b"\n" else "⇥"), "symbol"
    character = data.decode(errors="replace")
    if character == "\ufffd" or (character != " " and unicodedata.category(character)[0] in "CMZ"):
        return f"{data[0]:02X}", "hex"
    return character, "text"


def _words(cells: Sequence[Cell]) -> Iterator[list[Cell]]:
    """Cut after a space or newline, and before a word gets too wide for a line."""
    held: list[Cell] = []
    for cell in cells:
        wide = sum(c.columns for c in held) + cell.columns > _WORD_COLUMNS
        if held and (wide or held[-1].shown in (" ", "↵")):
            yield held
            held = []
        held.append(cell)
    if held:
        yield held


def _word(cells: Sequence[Cell], curve: _Curve) -> Word:
    first, last = cells[0].bytes[0].index, cells[-1].bytes[-1].index + 1
    return Word(
        cells=tuple(cells),
        columns=sum(cell.columns for cell in cells),
        curve=curve.points(first, last),
        peaks=curve.peaks(first, last),
        ends_line=cells[-1].kind == "symbol" and cells[-1].shown == "↵",
    )
