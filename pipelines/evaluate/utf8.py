"""UTF-8 validity of bytes: how many sequences are no text, and whether the end cuts a character."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Utf8Check:
    """What is wrong with some bytes."""

    invalid_sequences: int
    """As many as a decoder of Unicode's recommended practice puts U+FFFD for: the longest beginning of a character that
    breaks off, or else one byte."""
    cut: bool
    """Whether they end inside a character that is right so far; it is not among the invalid ones."""


def is_utf8(data: bytes) -> bool:
    """Whether all of it is valid UTF-8."""
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def check_utf8(data: bytes) -> Utf8Check:
    """What is wrong, all through `data`, which is short: each fault copies the rest."""
    invalid, start = 0, 0
    while True:
        try:
            data[start:].decode()
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data":
                return Utf8Check(invalid_sequences=invalid, cut=True)
            invalid, start = invalid + 1, start + error.end
        else:
            return Utf8Check(invalid_sequences=invalid, cut=False)
