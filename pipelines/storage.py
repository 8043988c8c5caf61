"""Storage: one root directory (a local path, or s3://) and the few operations that datasets need.

All paths are relative to the root, with "/" between parts. A dataset is built from exclusive writes alone: a file
appears whole or not at all, and the first writer wins, so that work may be done twice and data never. Small mutable
records (a manifest, a job record) are replaced atomically.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, BinaryIO

import fsspec
from fsspec.implementations.local import LocalFileSystem

from blt.errors import ConfigError
from pipelines.filesystem import BLOCK_BYTES, full_url, is_s3, open_reader, resolve, storage_errors
from pipelines.new_file import LocalTarget, NewFile, S3Target

__all__ = ["TEMPORARY", "Leftover", "NewFile", "Storage", "resolve"]

TEMPORARY = "_temporary"
"""Directory below a local root that holds files being written; nothing in it is ever data."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leftover:
    """What a killed run left of a file that it was writing."""

    name: str
    """A file below TEMPORARY, or "PATH?uploadId=ID" of an unfinished upload."""
    age_seconds: float
    """Since the last write."""
    size_bytes: int


class Storage:
    """Files below `root_uri`; can be pickled, so that Ray tasks take it as an argument, and used by several threads.

    A relative local root is made absolute here, because a Ray worker need not share the driver's working directory.
    Endpoint and credentials stay on each machine. Every method raises what `storage_errors` says; ConfigError for a
    root that is neither local nor on S3.
    """

    def __init__(self, root_uri: str) -> None:
        if not root_uri:
            raise ConfigError("the root of a dataset is empty: give a directory or a URI")
        filesystem, root = resolve(root_uri)
        self.is_local = isinstance(filesystem, LocalFileSystem)
        if not self.is_local and not is_s3(filesystem):
            raise ConfigError(f"cannot use {root_uri!r} as the root of a dataset: give a directory, or a URI of s3://")
        self._filesystem: fsspec.AbstractFileSystem = filesystem
        self._root = root.rstrip("/")
        self.root_uri = full_url(filesystem, self._root)

    def __repr__(self) -> str:
        return f"Storage({self.root_uri!r})"

    def __reduce__(self) -> tuple[type["Storage"], tuple[str]]:
        return Storage, (self.root_uri,)  # never the file system, which may hold credentials

    def url(self, path: str = "") -> str:
        """Full local path or URI of `path`."""
        return f"{self.root_uri}/{path}" if path else self.root_uri

    def exists(self, path: str) -> bool:
        """Whether there is a file (not a directory) of this name."""
        if self.is_local:
            return os.path.isfile(self._full(path))
        try:
            self._call("head_object", path, **self._object(path))
        except FileNotFoundError:
            return False
        return True

    def list(self, prefix: str = "") -> Sequence[str]:
        """Every file below the directory `prefix`, relative to the root and sorted; empty where there is no such
        directory. What is being written (TEMPORARY) is left out.
        """
        return sorted(self.sizes(prefix))

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Bytes of every file that `list` gives, from one listing."""
        found = self._local_sizes(prefix) if self.is_local else self._s3_sizes(prefix)
        return {path: size for path, size in found if not path.startswith(f"{TEMPORARY}/")}

    def open(self, path: str) -> BinaryIO:
        """Seekable binary reader."""
        return open_reader(self._filesystem, self._full(path))

    def read_bytes(self, path: str) -> bytes:
        full = self._full(path)
        with storage_errors(self.url(path)):
            return bytes(self._filesystem.cat_file(full))

    def read_range(self, path: str, start: int, end: int) -> bytes:
        """Bytes [start, end) of a file, in one request; fewer where it ends before."""
        full = self._full(path)
        with storage_errors(self.url(path)):
            return bytes(self._filesystem.cat_file(full, start=start, end=end)) if end > start else b""

    def sha256(self, path: str) -> str:
        """Hex digest of a file, read in blocks."""
        digest = hashlib.sha256()
        with self.open(path) as file:
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
        return digest.hexdigest()

    @contextlib.contextmanager
    def create(self, path: str) -> Iterator[NewFile]:
        """Write `path` front to back, in the memory of about one block; published whole where the block is left.

        Something that is there already stays, and `created` of the new file is False. An exception inside the block
        discards all that was written.
        """
        new = NewFile(self._target(path))
        try:
            yield new
        except BaseException:
            new.discard()
            raise
        new.publish()

    def write_exclusive(self, path: str, data: bytes | memoryview) -> bool:
        """Create `path` with `data`; False, with nothing changed, if it was there already."""
        if self.is_local and os.path.exists(self._full(path)):
            return False
        with self.create(path) as new:
            new.write(data)
        return new.created

    def write_replace(self, path: str, data: bytes) -> None:
        """Create or atomically replace `path`: for small records that change, never for data."""
        if self.is_local:
            target = self._local_target(path)
            try:
                target.write(memoryview(data))
            except BaseException:
                target.discard()
                raise
            target.replace()
        else:
            self._call("put_object", path, **self._object(path), Body=data)

    def delete(self, path: str) -> None:
        """Remove one file; nothing happens if it is not there."""
        if not self.is_local:
            self._call("delete_object", path, **self._object(path))
            return
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._full(path))

    def leftovers(self, older_than_seconds: float) -> Sequence[Leftover]:
        """Unfinished files below the root that nobody has written to for so long; `list` never shows them."""
        found = self._local_leftovers() if self.is_local else self._s3_leftovers()
        return sorted((one for one in found if one.age_seconds >= older_than_seconds), key=lambda one: one.name)

    def remove_leftovers(self, leftovers: Sequence[Leftover]) -> None:
        """Remove what `leftovers` gave; what is gone already is no error."""
        for leftover in leftovers:
            if self.is_local:
                self.delete(leftover.name)
                continue
            path, _, upload = leftover.name.rpartition("?uploadId=")
            with contextlib.suppress(FileNotFoundError):
                self._call("abort_multipart_upload", path, **self._object(path), UploadId=upload)

    def _full(self, path: str) -> str:
        if ".." in PurePosixPath(path).parts or path.startswith("/"):
            raise ConfigError(f"path {path!r} leaves the dataset {self.root_uri}")
        return f"{self._root}/{path}" if path else self._root

    def _target(self, path: str) -> LocalTarget | S3Target:
        return self._local_target(path) if self.is_local else S3Target(self._filesystem, self._full(path))

    def _local_target(self, path: str) -> LocalTarget:
        return LocalTarget(self._full(path), self._full(TEMPORARY))

    def _local_sizes(self, prefix: str) -> Iterator[tuple[str, int]]:
        def refuse(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError | NotADirectoryError):
                raise error

        for directory, _, names in os.walk(self._full(prefix), onerror=refuse):
            for name in names:
                full = os.path.join(directory, name)
                with contextlib.suppress(FileNotFoundError):  # a temporary file that was finished meanwhile
                    yield os.path.relpath(full, self._root), os.stat(full).st_size

    def _local_leftovers(self) -> Iterator[Leftover]:
        now = time.time()
        for name in os.listdir(self._full(TEMPORARY)) if os.path.isdir(self._full(TEMPORARY)) else []:
            path = f"{TEMPORARY}/{name}"
            with contextlib.suppress(FileNotFoundError):  # finished meanwhile
                status = os.stat(self._full(path))
                yield Leftover(name=path, age_seconds=now - status.st_mtime, size_bytes=status.st_size)

    def _s3_sizes(self, prefix: str) -> Iterator[tuple[str, int]]:
        for page in self._pages("list_objects_v2", prefix, {"ContinuationToken": "NextContinuationToken"}):
            for found in page.get("Contents", []):
                if not found["Key"].endswith("/"):  # a file browser's mark of an empty directory
                    yield self._relative(found["Key"]), int(found["Size"])

    def _s3_leftovers(self) -> Iterator[Leftover]:
        now = datetime.datetime.now(datetime.UTC)
        markers = {"KeyMarker": "NextKeyMarker", "UploadIdMarker": "NextUploadIdMarker"}
        for page in self._pages("list_multipart_uploads", "", markers):
            for upload in page.get("Uploads", []):
                path = self._relative(upload["Key"])
                parts = self._parts(path, upload["UploadId"])
                last = max([upload["Initiated"], *(part["LastModified"] for part in parts)])
                yield Leftover(
                    name=f"{path}?uploadId={upload['UploadId']}",
                    age_seconds=(now - last).total_seconds(),
                    size_bytes=sum(part["Size"] for part in parts),
                )

    def _parts(self, path: str, upload: str) -> Sequence[Mapping[str, Any]]:
        """Of an unfinished upload; none where it is finished meanwhile."""
        try:
            markers = {"PartNumberMarker": "NextPartNumberMarker"}
            pages = list(self._follow("list_parts", path, markers, **self._object(path), UploadId=upload))
        except FileNotFoundError:
            return []
        return [part for page in pages for part in page.get("Parts", [])]

    def _pages(self, method: str, prefix: str, markers: Mapping[str, str]) -> Iterator[Mapping[str, Any]]:
        """Every page of a listing of what lies below `prefix`."""
        place = self._object(prefix)
        key = f"{place['Key']}/" if place["Key"] else ""
        return self._follow(method, prefix, markers, Bucket=place["Bucket"], Prefix=key)

    def _follow(self, method: str, path: str, markers: Mapping[str, str], **arguments: Any) -> Iterator[dict[str, Any]]:
        """Every page of an answer; `markers` name what a request takes to go on, and where the last answer holds it."""
        position: dict[str, Any] = {}
        while True:
            page = self._call(method, path, **arguments, **position)
            yield page
            if not page.get("IsTruncated"):
                return
            position = {name: page[source] for name, source in markers.items() if page.get(source)}

    def _object(self, path: str) -> dict[str, str]:
        bucket, key, _ = self._filesystem.split_path(self._full(path))
        return {"Bucket": bucket, "Key": key}

    def _relative(self, key: str) -> str:
        root = self._object("")["Key"]
        return key[len(root) + 1 :] if root else key

    def _call(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:
        with storage_errors(self.url(path)):
            return dict(self._filesystem.call_s3(method, **arguments))
