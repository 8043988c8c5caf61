"""Storage: one root directory (a local path, or any fsspec URI) and the few operations that datasets need.

All paths are relative to the root, with "/" between parts. A dataset is built from exclusive writes alone: a file
appears whole or not at all, and the first writer wins, so that work may be done twice and data never. Small mutable
records (a manifest, a job record) are replaced atomically.
"""

import os
import uuid
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import BinaryIO, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from blt.errors import ConfigError

TEMPORARY = "_temporary"
"""Directory below a local root that holds files being written; nothing in it is ever data."""


class Storage:
    """Files below `root_uri`; can be pickled, so that Ray tasks take it as an argument.

    A relative local root is made absolute here, because a Ray worker need not share the driver's working directory.
    Errors of the file system (FileNotFoundError, PermissionError, OSError for a full disk) pass through unchanged;
    ConfigError for a root that no installed file system understands.
    """

    def __init__(self, root_uri: str) -> None:
        if not root_uri:
            raise ConfigError("the root of a dataset is empty: give a directory or a URI")
        try:
            filesystem, root = fsspec.core.url_to_fs(root_uri)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"cannot use {root_uri!r} as the root of a dataset: {error}") from error
        self._filesystem: fsspec.AbstractFileSystem = filesystem
        self._root = str(root).rstrip("/")
        self.is_local = isinstance(filesystem, LocalFileSystem)
        self.root_uri = self._root if self.is_local else str(filesystem.unstrip_protocol(self._root))

    def __repr__(self) -> str:
        return f"Storage({self.root_uri!r})"

    def url(self, path: str = "") -> str:
        """Full local path or URI of `path`."""
        return f"{self.root_uri}/{path}" if path else self.root_uri

    def exists(self, path: str) -> bool:
        return bool(self._filesystem.isfile(self._full(path)))

    def list(self, prefix: str = "") -> Sequence[str]:
        """Every file below the directory `prefix`, relative to the root and sorted; empty where there is no such
        directory.
        """
        found = self._filesystem.find(self._full(prefix))
        return sorted(str(full)[len(self._root) + 1 :] for full in found)

    def open(self, path: str) -> BinaryIO:
        """Seekable binary reader."""
        return cast(BinaryIO, self._filesystem.open(self._full(path), "rb"))

    def read_bytes(self, path: str) -> bytes:
        return bytes(self._filesystem.cat_file(self._full(path)))

    def write_exclusive(self, path: str, data: bytes | memoryview) -> bool:
        """Create `path` with `data`; False, with nothing changed, if it was there already.

        The file is never seen half-written. Locally: a synced temporary file, then a hard link, which fails where
        the name is taken. Elsewhere: one conditional create.
        """
        if self.is_local:
            return self._link_exclusive(path, data)
        try:
            self._filesystem.pipe_file(self._full(path), bytes(data), mode="create")
        except FileExistsError:
            return False
        return True

    def write_replace(self, path: str, data: bytes) -> None:
        """Create or atomically replace `path`: for small records that change, never for data."""
        if self.is_local:
            temporary = self._write_temporary(data)
            self._make_parent(path)
            os.replace(temporary, self._full(path))
        else:
            self._filesystem.pipe_file(self._full(path), data)

    def delete(self, path: str) -> None:
        """Remove one file; nothing happens if it is not there."""
        if self.exists(path):
            self._filesystem.rm_file(self._full(path))

    def _full(self, path: str) -> str:
        if ".." in PurePosixPath(path).parts or path.startswith("/"):
            raise ConfigError(f"path {path!r} leaves the dataset {self.root_uri}")
        return f"{self._root}/{path}" if path else self._root

    def _make_parent(self, path: str) -> None:
        os.makedirs(os.path.dirname(self._full(path)), exist_ok=True)

    def _link_exclusive(self, path: str, data: bytes | memoryview) -> bool:
        if os.path.exists(self._full(path)):
            return False
        temporary = self._write_temporary(data)
        try:
            self._make_parent(path)
            os.link(temporary, self._full(path))
        except FileExistsError:
            return False
        finally:
            os.unlink(temporary)
        return True

    def _write_temporary(self, data: bytes | memoryview) -> str:
        """Write and sync `data` under a fresh name; a failed write (a full disk) leaves nothing behind."""
        temporary = self._full(f"{TEMPORARY}/{uuid.uuid4().hex}")
        os.makedirs(os.path.dirname(temporary), exist_ok=True)
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            if os.path.exists(temporary):
                os.unlink(temporary)
            raise
        return temporary
