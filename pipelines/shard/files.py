"""The files of a corpus: paths, globs and directories in, a sorted list of readable files out; nothing is decoded."""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import BinaryIO, Literal, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from blt.errors import DataError

_LOGGER = logging.getLogger(__name__)

_SAMPLE_BYTES = 64 * 2**10

Format = Literal["jsonl", "txt", "parquet"]
Compression = Literal["gzip", "zstd"]

FORMATS: dict[str, tuple[Format, Compression | None]] = {
    ".jsonl": ("jsonl", None),
    ".jsonl.gz": ("jsonl", "gzip"),
    ".jsonl.zst": ("jsonl", "zstd"),
    ".txt": ("txt", None),
    ".parquet": ("parquet", None),
}
"""Accepted endings of a file name, and what they stand for."""

_TEXT_PER_BYTE = {".jsonl": 1.0, ".jsonl.gz": 3.0, ".jsonl.zst": 3.5, ".txt": 1.0, ".parquet": 2.5}
"""Usual text bytes for each byte of a file, by which files are gathered into groups of about equal work."""


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """One file of a corpus."""

    url: str
    """Where it is read: an absolute path or a URI."""
    name: str
    """Its name in the dataset: the path below the directory or glob that found it, so that a corpus may move."""
    size_bytes: int
    sample: str
    """Hex sha256 of its first and last 64 KiB."""

    @property
    def text_bytes(self) -> int:
        """Estimated bytes of text."""
        return int(self.size_bytes * _TEXT_PER_BYTE[_suffix(self.name)])

    @property
    def format(self) -> Format:
        return FORMATS[_suffix(self.name)][0]

    @property
    def compression(self) -> Compression | None:
        return FORMATS[_suffix(self.name)][1]


def find_files(inputs: Sequence[str]) -> tuple[InputFile, ...]:
    """Every file that `inputs` name, once, sorted by name. DataError names an input that yields none.

    Directories are searched at every depth; there and in globs, hidden files (a part that starts with "." or "_") and
    files of other kinds are passed over, and the latter logged. A file named by itself must have an accepted ending.
    """
    found: dict[str, str] = {}
    for entry in inputs:
        named = dict(_named_by(entry))
        if not named:
            raise DataError(f"input {entry!r} holds no file that ends in {', '.join(FORMATS)}")
        for url, name in named.items():
            found.setdefault(url, name)
    names = distinct_names(found)
    return tuple(sorted((_inspect(url, name) for url, name in names.items()), key=lambda file: file.name))


def distinct_names(names: Mapping[str, str]) -> dict[str, str]:
    """`names` (url -> name) with parent directories of the url put before names that several files share."""
    result, depth = dict(names), 1
    while shared := {name for name, count in Counter(result.values()).items() if count > 1}:
        depth += 1
        for url, name in result.items():
            if name in shared:
                result[url] = "/".join(PurePosixPath(url).parts[-max(depth, name.count("/") + 2) :]).lstrip("/")
    return result


def open_file(url: str) -> BinaryIO:
    """A seekable binary reader of one file; DataError, naming it, if it cannot be opened."""
    try:
        return cast(BinaryIO, fsspec.open(url, "rb").open())
    except OSError as error:
        raise DataError(f"cannot read {url}: {error.strerror or error}") from error


def _named_by(entry: str) -> Iterator[tuple[str, str]]:
    try:
        filesystem, path = fsspec.core.url_to_fs(entry)
    except (ValueError, ImportError) as error:
        raise DataError(f"cannot use input {entry!r}: {error}") from error
    if filesystem.isfile(path):
        if _suffix(path) not in FORMATS:
            raise DataError(f"input {entry!r} must end in one of {', '.join(FORMATS)}")
        yield _url(filesystem, path), PurePosixPath(path).name
        return
    if filesystem.isdir(path):
        base, paths = path, filesystem.find(path)
    elif any(character in path for character in "*?["):
        base, paths = _fixed_part(path), [p for p in filesystem.glob(path) if filesystem.isfile(p)]
    else:
        raise DataError(f"input {entry!r} does not exist")
    names = {p: str(PurePosixPath(p).relative_to(base)) for p in paths}
    visible = {p: name for p, name in names.items() if not any(part[0] in "._" for part in PurePosixPath(name).parts)}
    wanted = {p: name for p, name in visible.items() if _suffix(name) in FORMATS}
    if len(wanted) < len(visible):
        _LOGGER.warning("input=%s files_of_other_kinds_passed_over=%d", entry, len(visible) - len(wanted))
    yield from ((_url(filesystem, p), name) for p, name in wanted.items())


def _url(filesystem: fsspec.AbstractFileSystem, path: str) -> str:
    return path if isinstance(filesystem, LocalFileSystem) else str(filesystem.unstrip_protocol(path))


def _fixed_part(pattern: str) -> str:
    """The directory of a glob above its first wildcard."""
    fixed: list[str] = []
    for part in PurePosixPath(pattern).parts[:-1]:
        if any(character in part for character in "*?["):
            break
        fixed.append(part)
    return str(PurePosixPath(*fixed))


def _suffix(name: str) -> str:
    """The accepted ending of `name` in lower case, or its last suffix."""
    lower = name.lower()
    return next((s for s in FORMATS if lower.endswith(s)), PurePosixPath(lower).suffix)


def _inspect(url: str, name: str) -> InputFile:
    if not name.isprintable():  # a surrogate stands for a byte that is not UTF-8
        raise DataError(f"cannot use {url!r}: rename it to printable UTF-8")
    digest = hashlib.sha256()
    try:
        with open_file(url) as file:
            digest.update(file.read(_SAMPLE_BYTES))
            size = file.seek(0, 2)
            file.seek(max(_SAMPLE_BYTES, size - _SAMPLE_BYTES) if size > _SAMPLE_BYTES else size)
            digest.update(file.read())
    except OSError as error:
        raise DataError(f"cannot read {url}: {error.strerror or error}") from error
    return InputFile(url=url, name=name, size_bytes=size, sample=digest.hexdigest())
