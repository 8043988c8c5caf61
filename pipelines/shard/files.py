"""The files of a corpus: paths, globs and directories in, a sorted list of readable files out; nothing is decoded."""

import hashlib
import logging
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO, Literal

import fsspec

from blt.errors import ConfigError, DataError
from pipelines.filesystem import full_url, open_reader, resolve, storage_errors
from pipelines.shard.config import SourceConfig, SourceFormat

_LOGGER = logging.getLogger(__name__)

_SAMPLE_BYTES = 64 * 2**10
_SAMPLING_THREADS = 32
"""Samples are small reads, which wait on the network and not on the processor."""

Format = Literal["jsonl", "txt", "parquet", "binary"]
Compression = Literal["gzip", "zstd"]

COMPRESSIONS: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd"}

FORMATS: dict[str, tuple[Format, Compression | None]] = {
    ".jsonl": ("jsonl", None),
    ".jsonl.gz": ("jsonl", "gzip"),
    ".jsonl.zst": ("jsonl", "zstd"),
    ".txt": ("txt", None),
    ".txt.gz": ("txt", "gzip"),
    ".txt.zst": ("txt", "zstd"),
    ".parquet": ("parquet", None),
}
"""Endings of a file name that format auto accepts, and what they stand for."""

_PARQUET_TEXT_PER_BYTE = 2.5
_TEXT_PER_BYTE: dict[Compression | None, float] = {None: 1.0, "gzip": 3.0, "zstd": 3.5}
"""Usual text bytes for each byte of a file, by which files are gathered into groups of about equal work."""


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """One file of a corpus."""

    url: str
    """Where it is read: an absolute path or a URI."""
    name: str
    """Its name in the dataset: the path below the directory or glob that found it, so that a corpus may move."""
    format: Format
    compression: Compression | None = None
    size_bytes: int
    sample: str
    """Hex sha256 of its first and last 64 KiB."""

    @property
    def text_per_byte(self) -> float:
        """Estimated bytes of text for each byte of the file."""
        return _PARQUET_TEXT_PER_BYTE if self.format == "parquet" else _TEXT_PER_BYTE[self.compression]


def find_files(source: SourceConfig) -> tuple[InputFile, ...]:
    """Every file that the source's inputs name, once, sorted by name. DataError names an input that yields none.

    Directories are searched at every depth; there and in globs, hidden files (a part that starts with "." or "_") are
    passed over, and with format auto files of other kinds, which are logged. A file named by itself is always meant.
    """
    found: dict[str, _Found] = {}
    for entry in source.input:
        named = list(_named_by(entry, source.format))
        if not named:
            what = f" that ends in {', '.join(FORMATS)}" if source.format == "auto" else ""
            raise DataError(f"input {entry!r} holds no file{what}")
        for file in named:
            found.setdefault(file.url, file)
    names = distinct_names({url: file.name for url, file in found.items()})
    with ThreadPoolExecutor(_SAMPLING_THREADS) as pool:
        files = list(pool.map(lambda file: _inspect(file, names[file.url], source.format), found.values()))
    return tuple(sorted(files, key=lambda file: file.name))


def searched_directory(entry: str) -> str | None:
    """The directory, as a path or URI, of which an input takes files at every depth; None for one that does not."""
    filesystem, path = resolve(entry)
    with storage_errors(full_url(filesystem, path)):
        base = path if filesystem.isdir(path) else _fixed_part(path) if "**" in path else None
    return None if base is None else full_url(filesystem, base).rstrip("/")


def refuse_output_in_input(output: str, entries: Iterable[str], files: Iterable[InputFile]) -> None:
    """ConfigError if what is written below `output` would be found by one of the inputs `entries`, which have found
    `files`: a second run would read what the first one wrote.
    """
    root = output + "/"
    for entry in entries:
        base = searched_directory(entry)
        if base is not None and root.startswith(base + "/") and not is_hidden(root.removeprefix(base + "/")):
            raise ConfigError(f"output {output} lies inside input {entry}: choose another output")
    for file in files:
        if file.url.startswith(root):
            raise ConfigError(f"input file {file.url} lies inside the output {output}: choose another output")


def is_hidden(name: str) -> bool:
    """Whether directories and globs pass over the file of this name (its path below them)."""
    return any(part[0] in "._" for part in PurePosixPath(name).parts)


def distinct_names(names: Mapping[str, str]) -> dict[str, str]:
    """`names` (url -> name) with parent directories of the url put before names that several files share."""
    result, depth = dict(names), 1
    while shared := {name for name, count in Counter(result.values()).items() if count > 1}:
        depth += 1
        for url, name in result.items():
            if name in shared:
                # An object's key may have empty parts, which tell it from another; a whole path keeps no root.
                longer = "/".join(url.split("/")[-max(depth, name.count("/") + 2) :])
                result[url] = longer.lstrip("/") if longer == url else longer
    return result


def open_file(url: str) -> BinaryIO:
    """A seekable binary reader of one file; DataError, naming it, if it cannot be opened."""
    try:
        return open_reader(*resolve(url))
    except OSError as error:
        raise DataError(f"cannot read {url}: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    """What an error says, without line breaks."""
    return " ".join(str(getattr(error, "strerror", None) or error).split())


@dataclass(frozen=True, kw_only=True)
class _Found:
    """A file of a listing."""

    filesystem: fsspec.AbstractFileSystem
    path: str
    url: str
    name: str
    size_bytes: int


def _named_by(entry: str, expected: SourceFormat) -> Iterator[_Found]:
    """The files that one input stands for."""
    try:
        filesystem, path = resolve(entry)
        with storage_errors(full_url(filesystem, path)):
            sizes, base = _listed(filesystem, path, entry)
    except OSError as error:
        raise DataError(f"cannot read input {entry!r}: {one_line(error)}") from error
    if not base and expected == "auto" and _suffix(path) not in FORMATS:
        raise DataError(f"input {entry!r} must end in one of {', '.join(FORMATS)}, or format be given")
    names = {file: str(PurePosixPath(file).relative_to(base)) if base else PurePosixPath(file).name for file in sizes}
    visible = [file for file, name in names.items() if not base or not is_hidden(name)]
    wanted = [file for file in visible if expected != "auto" or _suffix(file) in FORMATS]
    if len(wanted) < len(visible):
        _LOGGER.warning("input=%s files_of_other_kinds_passed_over=%d", entry, len(visible) - len(wanted))
    for file in wanted:
        url = full_url(filesystem, file)
        yield _Found(filesystem=filesystem, path=file, url=url, name=names[file], size_bytes=sizes[file])


def _listed(filesystem: fsspec.AbstractFileSystem, path: str, entry: str) -> tuple[dict[str, int], str]:
    """Path -> size of the files that `path` stands for, and the directory that their names begin below ("" for a file
    named by itself).
    """
    try:
        info = filesystem.info(path)
    except FileNotFoundError as error:
        if not any(character in path for character in "*?["):
            raise DataError(f"input {entry!r} does not exist") from error
        return _sizes(filesystem.glob(path, detail=True)), _fixed_part(path)
    if info["type"] == "directory":
        return _sizes(filesystem.find(path, detail=True)), path
    return {path: int(info["size"])}, ""


def _sizes(listing: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    return {path: int(info["size"]) for path, info in listing.items() if info["type"] == "file"}


def _fixed_part(pattern: str) -> str:
    """The directory of a glob above its first wildcard."""
    fixed: list[str] = []
    for part in PurePosixPath(pattern).parts[:-1]:
        if any(character in part for character in "*?["):
            break
        fixed.append(part)
    return str(PurePosixPath(*fixed))


def _suffix(name: str) -> str:
    """The ending of `name` that format auto accepts, in lower case, or "" if there is none."""
    lower = name.lower()
    return next((suffix for suffix in FORMATS if lower.endswith(suffix)), "")


def _inspect(found: _Found, name: str, expected: SourceFormat) -> InputFile:
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in name):
        # A surrogate stands for a byte that is not UTF-8.
        raise DataError(f"cannot use {found.url!r}: rename it to UTF-8 without control characters")
    compression = COMPRESSIONS.get(PurePosixPath(name.lower()).suffix) if expected in ("jsonl", "txt") else None
    format_, compression = FORMATS[_suffix(name)] if expected == "auto" else (expected, compression)
    return InputFile(
        url=found.url,
        name=name,
        format=format_,
        compression=compression,
        size_bytes=found.size_bytes,
        sample=_sample(found),
    )


def _sample(found: _Found) -> str:
    """Hex sha256 of both ends of a file."""
    digest, size = hashlib.sha256(), found.size_bytes
    ends = [(0, size)] if size <= 2 * _SAMPLE_BYTES else [(0, _SAMPLE_BYTES), (size - _SAMPLE_BYTES, size)]
    try:
        with storage_errors(found.url):
            for start, end in ends:
                digest.update(found.filesystem.cat_file(found.path, start=start, end=end) if end else b"")
    except OSError as error:
        raise DataError(f"cannot read {found.url}: {one_line(error)}") from error
    return digest.hexdigest()
