"""Bytes that come in pieces are shown as whole characters, and what is none is made visible."""

import pytest

from jobs.shown_text import ShownText, visible

TEXT = "aé日😀\n".encode() + b"\xff" + "é".encode() + b"\x1b[0m" + "日".encode()[:2]


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_pieces_have_no_say(size: int) -> None:
    shown = ShownText()
    parts = [shown.add(TEXT[i : i + size], [False] * len(TEXT[i : i + size])) for i in range(0, len(TEXT), size)]
    assert "".join(parts) + shown.end() == TEXT.decode("utf-8", "replace")
    if size == 1:
        assert parts[:4] == ["a", "", "é", ""]


def test_terminals_get_no_control_characters() -> None:
    shown = ShownText(escape=True)
    text = shown.add(TEXT, [False] * len(TEXT)) + shown.end()
    assert text == "aé日😀\n\ufffdé\\x1b[0m\ufffd"
    assert visible("\u202eab\ud800\t\x9b") == "\\u202eab\\ud800\t\\x9b"


def test_every_patch_is_read_by_itself() -> None:
    data = "é日".encode()
    shown = ShownText(patches=True)
    assert shown.add(data, [True, False, True, False, False]) + shown.end() == "│é│日"
    split = ShownText(patches=True)
    assert split.add(data, [False, False, False, True, False]) + split.end() == "é\\xe6│\\x97\\xa5"
    cut = ShownText(patches=True, escape=True)
    assert cut.add(data[:4] + b"\n\x07", [True, False, True, False, True, False]) == "│é│\\xe6\\x97│\n\\x07"
