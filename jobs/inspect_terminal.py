"""A patched text in the terminal: lines of text coloured by patch, the entropies under them, and a table of figures.

Where there are no colours (no terminal, NO_COLOR), a border stands where each patch starts. Bytes that are no text are
shown as escapes. The height under a character is that of the highest entropy among its bytes.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from jobs.passage_layout import ByteCell, Cell, lay_out
from jobs.patched_text import PatchedText, figure_rows
from jobs.report_table import row_table
from jobs.rule_text import rule_text
from jobs.shown_text import PATCH_BORDER, visible

HEIGHTS = "▁▂▃▄▅▆▇█"
"""From 0 nats to the top of the scale."""
_COLOURS = ("cyan", "yellow", "green", "magenta")
"""Of the sixteen that every terminal has, each readable under black: one for each colour of the layout."""
_PLAIN, _PEAK, _NOTE = Style(), Style(color="red", bold=True), Style(dim=True)
_MOST_COLUMNS = 120


@dataclass(frozen=True, kw_only=True)
class _Glyph:
    """A character, the escape of a byte, or a border; and what stands under it, of the same width or nothing."""

    text: str
    style: Style = _PLAIN
    under: str
    under_style: Style = _PLAIN


def print_inspection(
    console: Console, patched: PatchedText, name: str, left_out: str | None, *, print_bytes: int, longest: int
) -> None:
    """Print text, entropies, figures and the longest patches; `left_out` says in words what was not read."""
    coloured = console.is_terminal and not console.no_color and console.color_system is not None
    painter = _Painter(patched, print_bytes, coloured)
    for line in painter.lines(min(console.width, _MOST_COLUMNS)):
        console.print(line, soft_wrap=True)
    if print_bytes < len(patched.text):
        hidden = len(patched.text) - print_bytes
        console.print(Text(f"... {hidden:,} bytes more, not shown here (print_bytes)", style="bold"), soft_wrap=True)
    console.print(painter.legend(), soft_wrap=True)
    console.print(row_table(figure_rows(patched)))
    if longest and patched.text:
        console.print(_longest_table(patched, longest))
    told = f"{name}; {rule_text(patched.rule, patched.reset_on_newline)}"
    console.print(Text(visible(told), style=_NOTE), soft_wrap=True)
    if left_out is not None:
        console.print(Text(f"Left out: {left_out}", style="bold"), soft_wrap=True)


class _Painter:
    """Lines of text, each with the line of its entropies under it, of the first bytes of a text."""

    def __init__(self, patched: PatchedText, num_bytes: int, coloured: bool) -> None:
        self._coloured, self._threshold = coloured, patched.threshold
        self._entropies = patched.entropies[:num_bytes] if patched.entropies is not None else None
        self._layout = lay_out(patched.text[:num_bytes], patched.starts[:num_bytes], self._entropies, patched.threshold)

    def lines(self, width: int) -> Iterator[Text]:
        """Of at most `width` columns, where words allow."""
        held: list[_Glyph] = []
        columns = 0
        for word in self._layout.words:
            glyphs = [glyph for cell in word.cells for glyph in self._glyphs(cell)]
            size = sum(cell_len(glyph.text) for glyph in glyphs)
            if held and columns + size > width:
                yield from _pair(held)
                held, columns = [], 0
            held += glyphs
            columns += size
            if word.ends_line:
                yield from _pair(held)
                held, columns = [], 0
        if held:
            yield from _pair(held)

    def legend(self) -> Text:
        told = "Each colour change is a new patch" if self._coloured else f"{PATCH_BORDER} opens a patch"
        if top := self._layout.top_nats:
            scale = f"{HEIGHTS[0]} to {HEIGHTS[-1]}: 0 to {top:g} nats"
            told += f"; below, the entropy that each byte was predicted with, {scale}"
        return Text(told, style=_NOTE)

    def _glyphs(self, cell: Cell) -> Iterator[_Glyph]:
        """Of one character or byte; a character that a patch border parts is shown as bytes."""
        if cell.kind == "hex":
            yield from self._glyph(f"\\x{cell.shown.lower()}", cell.bytes)
        elif any(byte.opens for byte in cell.bytes[1:]):
            for value, byte in zip(cell.shown.encode(), cell.bytes, strict=True):
                yield from self._glyph(f"\\x{value:02x}", (byte,))
        else:
            yield from self._glyph(cell.shown, cell.bytes)

    def _glyph(self, text: str, of: Sequence[ByteCell]) -> Iterator[_Glyph]:
        if of[0].opens and not self._coloured:
            yield _Glyph(text=PATCH_BORDER, under=" " if self._entropies is not None else "")
        style = Style(color="black", bgcolor=_COLOURS[of[0].colour]) if self._coloured else _PLAIN
        if self._entropies is None:
            yield _Glyph(text=text, style=style, under="")
            return
        nats = max(self._entropies[byte.index] for byte in of)
        step = min(int(len(HEIGHTS) * nats / self._layout.top_nats), len(HEIGHTS) - 1)
        peak = self._threshold is not None and nats > self._threshold
        under_style = _PEAK if peak else _PLAIN
        yield _Glyph(text=text, style=style, under=HEIGHTS[step] * cell_len(text), under_style=under_style)


def _pair(glyphs: Sequence[_Glyph]) -> Iterator[Text]:
    """A line of text, and that of its entropies where there are any."""
    yield _joined((glyph.text, glyph.style) for glyph in glyphs)
    if any(glyph.under for glyph in glyphs):
        yield _joined((glyph.under, glyph.under_style) for glyph in glyphs)


def _joined(parts: Iterable[tuple[str, Style]]) -> Text:
    """Parts of one style that follow each other as one: a terminal is told of a change only."""
    runs = itertools.groupby(parts, key=lambda part: part[1])
    return Text.assemble(*(("".join(text for text, _ in run), style) for style, run in runs))


def _longest_table(patched: PatchedText, count: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("Longest patches", justify="right")
    table.add_column("at", justify="right")
    table.add_column("text", overflow="fold")
    for patch in patched.longest(count):
        table.add_row(f"{len(patch.data):,} bytes", f"{patch.first:,}", Text(patch.shown))
    return table
