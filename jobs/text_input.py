"""Text that a person gives to a command, as bytes: an argument, a file, or standard input."""

import os
import sys
from dataclasses import dataclass
from typing import BinaryIO

from pipelines.filesystem import open_reader, resolve

STANDARD_INPUT = "-"


@dataclass(frozen=True, kw_only=True)
class TextInput:
    """What was read, and what was not."""

    data: bytes
    left_out_bytes: int | None = 0
    """How much follows in the source; None where something does and nothing tells how much."""


def argument_bytes(text: str) -> bytes:
    """The bytes that a command line argument came as, valid UTF-8 or not."""
    return text.encode("utf-8", "surrogateescape")


def is_file(argument: str) -> bool:
    """Whether there is something to read at the path, or the argument is a URI."""
    try:
        return argument.startswith("s3://") or (os.path.exists(argument) and not os.path.isdir(argument))
    except ValueError:  # a NUL, which no path has
        return False


def read_input(source: str, max_bytes: int | None = None) -> TextInput:
    """The bytes of the file at a path or URI, or with "-" of standard input; of more than `max_bytes` the first ones.

    OSError, naming the file, for what cannot be read.
    """
    if source == STANDARD_INPUT:
        return _read(sys.stdin.buffer, max_bytes)
    with open_reader(*resolve(source)) as file:
        return _read(file, max_bytes)


def _read(file: BinaryIO, max_bytes: int | None) -> TextInput:
    if max_bytes is None:
        return TextInput(data=file.read())
    data = file.read(max_bytes + 1)
    if len(data) <= max_bytes:
        return TextInput(data=data)
    # A device may be sought in and still have no size.
    following = file.seek(0, os.SEEK_END) - max_bytes if file.seekable() else 0
    return TextInput(data=data[:max_bytes], left_out_bytes=following if following > 0 else None)
