r"""The text and id of one line of JSON, also where bytes are not UTF-8 or escapes are lone surrogates.

Such a line, which a JSON parser refuses, is kept on request: raw bytes stay exactly themselves, and a lone surrogate
\ud800 becomes its three bytes ED A0 80 (generalised UTF-8). The parser still judges everything else: surrogate escapes
are hidden from it behind a byte that it passes through, and that byte behind itself.
"""

import re
from collections.abc import Callable
from typing import Any

import msgspec

_HIDDEN = re.compile(rb"\xff|\\(?:u[dD][89a-fA-F][0-9a-fA-F]{2}|.)", re.DOTALL)
"""What hide() replaces: the byte FF and surrogate escapes; other escapes match so that they are passed over whole."""

_ESCAPE = re.compile(
    rb"\xff([dD][89abAB]..)\xff([dD][c-fC-F]..)"  # a pair of surrogates
    rb"|\xff(....)"  # a lone surrogate, or 00ff for the byte FF
    rb"|\\u(....)"
    rb"|\\(.)"
)
_SHORT_ESCAPES = {
    b'"': b'"',
    b"\\": b"\\",
    b"/": b"/",
    b"b": b"\b",
    b"f": b"\f",
    b"n": b"\n",
    b"r": b"\r",
    b"t": b"\t",
}


class RefusedError(ValueError):
    """A line that yields no document, and why."""


class TextDecoder:
    """Takes the text, the id and, where it has a key, a label out of JSON objects; no other key is looked at, and
    nothing else is built.
    """

    def __init__(self, text_key: str, id_key: str, keep_invalid: bool, label_key: str | None = None) -> None:
        names = {"text": text_key, "id": id_key} | ({} if label_key is None else {"label": label_key})
        labels = [(name, msgspec.Raw, msgspec.Raw(b"null")) for name in names if name != "text"]
        strict = msgspec.defstruct("Record", [("text", str), *labels], rename=names)
        raw = msgspec.defstruct("Record", [("text", msgspec.Raw), *labels], rename=names)
        self._strict: msgspec.json.Decoder[Any] = msgspec.json.Decoder(strict)
        self._raw: msgspec.json.Decoder[Any] = msgspec.json.Decoder(raw)
        self._keep_invalid, self._has_label = keep_invalid, label_key is not None

    def decode(self, line: bytes) -> tuple[bytes, str | None]:
        """The text's bytes and the id of one object. RefusedError, with a reason of one line, if it has no text."""
        return self.decode_labelled(line)[:2]

    def decode_labelled(self, line: bytes) -> tuple[bytes, str | None, str | None]:
        """As `decode`, and the label as text, None where the object has none."""
        try:
            record = self._strict.decode(line)
            return record.text.encode(), _valid_id(bytes(record.id)), self._label(record, _valid_id)
        except UnicodeDecodeError as error:
            if not self._keep_invalid:
                raise RefusedError("not valid UTF-8") from error
        except RecursionError as error:
            raise RefusedError("JSON is nested too deeply") from error
        except msgspec.ValidationError as error:
            raise RefusedError(f"{error}{_keys_of(line)}") from error
        except msgspec.DecodeError as error:
            if not self._only_surrogates_are_wrong(line):
                raise RefusedError(f"not valid JSON: {error}") from error
            if not self._keep_invalid:
                raise RefusedError("lone surrogate escape, which stands for no character") from error
        return self._decode_kept(line)

    def _only_surrogates_are_wrong(self, line: bytes) -> bool:
        hidden = hide_surrogates(line)
        if hidden == line:
            return False
        try:
            self._raw.decode(hidden)
        except msgspec.ValidationError:
            return True  # it is JSON: what else is wrong is found again when it is decoded
        except (msgspec.DecodeError, RecursionError):
            return False
        return True

    def _label(self, record: Any, read: Callable[[bytes], str | None]) -> str | None:
        return read(bytes(record.label)) if self._has_label else None

    def _decode_kept(self, line: bytes) -> tuple[bytes, str | None, str | None]:
        try:
            record = self._raw.decode(hide_surrogates(line))
            return _string(bytes(record.text)), _id(bytes(record.id)), self._label(record, _id)
        except msgspec.ValidationError as error:
            raise RefusedError(f"{error}{_keys_of(line)}") from error
        except msgspec.DecodeError as error:
            raise RefusedError(f"not valid JSON: {error}") from error
        except RecursionError as error:
            raise RefusedError("JSON is nested too deeply") from error


def hide_surrogates(line: bytes) -> bytes:
    r"""`line` with each escape \udXXX as FF dXXX and each byte FF as FF 00ff: JSON exactly where `line` is, but for
    its surrogates, and with nothing in it that stands for two things.
    """
    return _HIDDEN.sub(_hide, line)


def unescape(content: bytes) -> bytes:
    """The bytes that the content of a JSON string, hidden as above, stands for."""
    return _ESCAPE.sub(_unescape, content)


def _hide(match: re.Match[bytes]) -> bytes:
    found = match[0]
    if found == b"\xff":
        return b"\xff00ff"
    return b"\xff" + found[2:] if len(found) == 6 else found


def _unescape(match: re.Match[bytes]) -> bytes:
    high, low, hidden, unit, short = match.groups()
    if high:
        point = 0x10000 + ((int(high, 16) - 0xD800) << 10) + (int(low, 16) - 0xDC00)
        return chr(point).encode()
    if hidden:
        return b"\xff" if hidden == b"00ff" else chr(int(hidden, 16)).encode("utf-8", "surrogatepass")
    return chr(int(unit, 16)).encode() if unit else _SHORT_ESCAPES[short]


def _string(raw: bytes) -> bytes:
    if raw[:1] != b'"':
        msgspec.json.decode(raw, type=str)  # says what it is instead
    return unescape(raw[1:-1])


def _valid_id(raw: bytes) -> str | None:
    """As `_id`, of a line that the parser has accepted as it is."""
    return msgspec.json.decode(raw, type=str) if raw[:1] == b'"' else _id(raw)


def _id(raw: bytes) -> str | None:
    """The id as text: a label, so what is no string stays as it is written, and bytes that are no text are replaced."""
    if raw[:1] == b'"':
        return unescape(raw[1:-1]).decode(errors="replace")
    return None if raw == b"null" else raw.decode(errors="replace")


def _keys_of(line: bytes) -> str:
    """The first keys of a JSON object, for a reason that helps with a wrong text_key."""
    try:
        keys = list(msgspec.json.decode(line, type=dict[str, msgspec.Raw]))
    except (ValueError, RecursionError):
        return ""
    return f" (keys: {', '.join(keys[:8])}{', ...' if len(keys) > 8 else ''})"
