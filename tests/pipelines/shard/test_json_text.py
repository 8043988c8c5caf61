"""Raw bytes and lone surrogates in JSON lines: kept exactly, or refused with a reason."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipelines.shard.json_text import RefusedError, TextDecoder, hide_surrogates, unescape

KEEP, STRICT = TextDecoder("text", "id", True), TextDecoder("text", "id", False)

HIGH, LOW = st.integers(0xD800, 0xDBFF), st.integers(0xDC00, 0xDFFF)
RAW = st.binary(min_size=1, max_size=3).filter(lambda raw: all(byte >= 0x20 and byte not in b'"\\' for byte in raw))
PIECES = st.lists(
    st.one_of(
        RAW,
        HIGH,
        LOW,
        st.integers(0, 0xFFFF),
        st.sampled_from([b'\\"', b"\\\\", b"\\/", b"\\n", b"\\t", b"\\b", b"\\f", b"\\r"]),
    ),
    max_size=12,
)


def _line(pieces: list[bytes | int]) -> bytes:
    return b"".join(piece if isinstance(piece, bytes) else b"\\u%04x" % piece for piece in pieces)


def _expected(pieces: list[bytes | int]) -> bytes:
    """What the pieces stand for: escapes that follow each other are one run of UTF-16."""
    result, units = b"", list[int]()
    for piece in [*pieces, b""]:
        if isinstance(piece, int):
            units.append(piece)
            continue
        run = b"".join(unit.to_bytes(2, "little") for unit in units).decode("utf-16-le", "surrogatepass")
        result += run.encode("utf-8", "surrogatepass")
        units.clear()
        result += json.loads(b'"' + piece + b'"').encode() if piece[:1] == b"\\" else piece
    return result


@given(PIECES)
@example([0xD83D, 0xDE00])
@example([0xD83D, 0xD83D, 0xDE00, 0xDC80, b"\x80", b"\xff", b"\\\\", b"ud800"])
@example([b"\xed\xa0\xbd", 0xDE00])
@example([b"\xff", b"d800", b"\xff00ff", 0xDFFF])
def test_every_byte_and_surrogate_is_kept_exactly(pieces: list[bytes | int]) -> None:
    content = _line(pieces)
    assert unescape(hide_surrogates(content)) == _expected(pieces)
    text, doc_id = KEEP.decode(b'{"a": "\\ud800", "text": "' + content + b'", "id": 7}')
    assert (text, doc_id) == (_expected(pieces), "7")


@given(PIECES)
def test_quarantine_takes_exactly_what_is_unicode(pieces: list[bytes | int]) -> None:
    line = b'{"text": "' + _line(pieces) + b'"}'
    expected = _expected(pieces)
    if _is_unicode(expected):
        assert STRICT.decode(line)[0] == expected
        return
    with pytest.raises(RefusedError, match=r"^not valid UTF-8$|^lone surrogate escape"):
        STRICT.decode(line)


def _is_unicode(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": 7, "x": "\\ud800"}', "Expected `str`, got `int` - at `$.text`"),
        (b'{"body": "\\ud800"}', "missing required field `text`"),
        (b'{"text": "\xff', "not valid JSON"),
        (b'{"text": "\\ud800"', "not valid JSON"),
        (b'{"text": "\\ud800 \x01"}', "not valid JSON"),
        (b'{"text": "\\ud800 \\x"}', "not valid JSON"),
        (b'{"text": "\\ud8"}', "not valid JSON"),
        (b'{"text": "\xff", "x": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"text": "\xff"} {}', "not valid JSON"),
    ],
)
def test_what_is_no_json_is_refused_all_the_same(line: bytes, reason: str) -> None:
    with pytest.raises(RefusedError) as error:
        KEEP.decode(line)
    assert reason in str(error.value)


def test_an_id_is_always_text() -> None:
    assert KEEP.decode(b'{"text": "a", "id": "x\xff\\ud800y"}')[1] == "x\ufffd\ufffd\ufffd\ufffdy"
    assert KEEP.decode(b'{"text": "\xff", "id": null}')[1] is None
    for decoder in (KEEP, STRICT):
        assert decoder.decode(b'{"text": "a", "id": 7.5}')[1] == "7.5"
        assert decoder.decode(b'{"text": "a", "id": {"$oid": "5f"}}')[1] == '{"$oid": "5f"}'
