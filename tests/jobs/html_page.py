"""A page of ours, read back: its elements, the text that it shows, and the passage in patches byte by byte."""

import html.parser
import itertools
import re

_VOID = {"meta", "link", "br", "input"}


class HtmlPage(html.parser.HTMLParser):
    """A page that was read: AssertionError if its elements are not nested."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        """Of every element: its tag, the attribute's name and its value."""
        self.cells: list[str] = []
        """What is shown of each character, or of each byte of what is none."""
        self.titles: list[str] = []
        """Of each byte."""
        self.first_titles: list[int] = []
        """For each cell, the index of its first byte's title."""
        self.text = ""
        self.feed(text)
        self.close()

    def passage(self) -> bytes:
        """The text of the passage, byte for byte, as titles tell it; what is shown must be the same."""
        borders = [*self.first_titles, len(self.titles)]
        text = b""
        for cell, (first, end) in zip(self.cells, itertools.pairwise(borders), strict=True):
            named = [re.match(r"0x([0-9A-F]{2}) ", title) for title in self.titles[first:end]]
            data = bytes.fromhex("".join(name[1] for name in named if name))
            shown = {"↵": b"\n", "⇥": b"\t"}.get(cell, cell.encode())
            assert data == shown or cell == data.hex().upper()
            text += data
        return text

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in _VOID:
            self.open.append(tag)
        if tag == "i":
            self.titles.append(dict(attrs)["title"] or "")
        if tag == "b" or (tag == "i" and "b" not in self.open):
            self.cells.append("")
            self.first_titles.append(len(self.titles) - (tag == "i"))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("i", "u"):
            self.cells[-1] += data
        if not {"style", "script"} & set(self.open):
            self.text += data
