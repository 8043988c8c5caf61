"""A file that is being created: written front to back in bounded memory, then published whole, and only where nothing
is there yet.

Locally that is a synced temporary file and a hard link, which fails where the name is taken. On S3 it is a conditional
PUT, or for more than a block a multipart upload with a conditional completion. Of writers that complete at the same
instant S3 lets one pass; servers that check first and complete then (seaweedfs 4.48) may let several pass, and the
last of them stays. So what must have one winner everywhere (a claim, a commit record) is smaller than a block, and
data files hold the same bytes whoever writes them.
"""

import contextlib
import errno
import hashlib
import io
import logging
import os
import time
import uuid
from typing import Any, BinaryIO, Protocol

import fsspec

from blt.errors import DataError
from pipelines.filesystem import BLOCK_BYTES, full_url, service_code, storage_errors

logger = logging.getLogger(__name__)

_TAKEN = ("PreconditionFailed", "412")
_CONFLICT = ("ConditionalRequestConflict", "409")
"""Another writer of the same key is at work."""
_GONE = ("NoSuchUpload", "404")
_PUBLISH_ATTEMPTS = 5
_WRITER = "writer"
"""Key of the metadata that tells whose write it was when the answer to it was lost."""


class Target(Protocol):
    """Where the bytes of a new file go."""

    def write(self, data: memoryview) -> None: ...

    def publish(self) -> bool:
        """False if something was there already; nothing is left behind then."""

    def discard(self) -> None:
        """Leaves nothing behind; never raises for what it could not remove."""


class NewFile(io.RawIOBase, BinaryIO):
    """Sequential binary writer. `created` and `sha256` hold once the file is published."""

    created: bool
    """False if something was there already: that stays as it is, and what was written here is dropped."""
    sha256: str
    """Hex, of all that was written."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._digest = hashlib.sha256()
        self.size_bytes = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.size_bytes

    def write(self, data: Any, /) -> int:
        if self.closed:
            raise ValueError("write to a closed file")
        with memoryview(data).cast("B") as view:
            self._target.write(view)
            self._digest.update(view)
            self.size_bytes += len(view)
            return len(view)

    def publish(self) -> None:
        self.close()
        self.created = self._target.publish()
        self.sha256 = self._digest.hexdigest()

    def discard(self) -> None:
        self.close()
        self._target.discard()


class LocalTarget:
    """A file in the directory `temporary`, on the same file system as `path`, until it is published."""

    def __init__(self, path: str, temporary: str) -> None:
        self._path = path
        self._temporary = os.path.join(temporary, uuid.uuid4().hex)
        with storage_errors(path):
            self._file = self._open()

    def write(self, data: memoryview) -> None:
        with storage_errors(self._path):
            self._file.write(data)

    def publish(self) -> bool:
        try:
            with storage_errors(self._path):
                self._sync()
                return self._link()
        finally:
            self.discard()

    def replace(self) -> None:
        """Publish in the place of whatever is there."""
        try:
            with storage_errors(self._path):
                self._sync()
                os.replace(self._temporary, self._path)
        except BaseException:
            self.discard()
            raise
        self._remove_directory()

    def discard(self) -> None:
        try:
            self._file.close()
        except OSError:
            pass  # what a full disk could not take is not wanted any more; the file is closed all the same
        finally:
            # Taken for a leftover, it is gone already: that must not replace the error that led here.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._temporary)
            self._remove_directory()

    def _open(self) -> BinaryIO:
        while True:
            # Another writer that was the last one there may remove the directory at any moment.
            with contextlib.suppress(FileExistsError):
                os.makedirs(os.path.dirname(self._temporary), exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                return open(self._temporary, "xb")

    def _remove_directory(self) -> None:
        try:
            os.rmdir(os.path.dirname(self._temporary))
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):  # others write there too
                raise

    def _link(self) -> bool:
        try:
            os.link(self._temporary, self._path)
        except FileExistsError:
            return False
        return True

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.makedirs(os.path.dirname(self._path), exist_ok=True)


class S3Target:
    """A multipart upload once there is more than a block, else one request.

    An answer that gets lost is asked for again, and the second answer says that the name is taken, or the upload gone.
    So every write carries a fresh name in the metadata, and the file that is there tells whether it is this one.
    """

    def __init__(self, filesystem: fsspec.AbstractFileSystem, path: str) -> None:
        self._filesystem, self._url = filesystem, full_url(filesystem, path)
        bucket, key, _ = filesystem.split_path(path)
        self._file = {"Bucket": bucket, "Key": key}
        self._writer = uuid.uuid4().hex
        self._buffer = bytearray()
        self._upload: str | None = None
        self._parts: list[dict[str, Any]] = []

    def write(self, data: memoryview) -> None:
        while data:
            room = BLOCK_BYTES - len(self._buffer)
            self._buffer += data[:room]
            data = data[room:]
            if len(self._buffer) == BLOCK_BYTES:
                self._send_part()

    def publish(self) -> bool:
        try:
            if self._upload and self._buffer:
                self._send_part()
            created = self._publish()
        except BaseException:
            self.discard()
            raise
        if not created:
            self.discard()
        return created

    def discard(self) -> None:
        self._buffer = bytearray()
        if self._upload:
            try:
                self._call("abort_multipart_upload", UploadId=self._upload)
            except FileNotFoundError:
                pass  # gone: this is asked for again where the first answer was lost
            except DataError as error:  # must not replace the error that led here; leftovers() will list it
                logger.warning("unfinished upload left behind url=%s error=%s", self._url, error)
            self._upload = None

    def _publish(self) -> bool:
        for attempt in range(_PUBLISH_ATTEMPTS):
            try:
                self._complete() if self._upload else self._put()
            except (OSError, DataError) as error:
                code = service_code(error)
                if code not in (*_TAKEN, *_CONFLICT, *_GONE):
                    raise
                if (writer := self._writer_of_what_is_there()) is not None:
                    return writer == self._writer
                if code not in _CONFLICT:
                    raise self._removed(error) from error
                time.sleep(0.1 * 2**attempt)
            else:
                return True
        raise DataError(f"{self._url}: other writers of the same file are in the way ({_CONFLICT[0]})")

    def _put(self) -> None:
        self._call("put_object", Body=bytes(self._buffer), IfNoneMatch="*", Metadata={_WRITER: self._writer})

    def _complete(self) -> None:
        parts = {"Parts": self._parts}
        self._call("complete_multipart_upload", UploadId=self._upload, MultipartUpload=parts, IfNoneMatch="*")

    def _send_part(self) -> None:
        if self._upload is None:
            answer = self._call("create_multipart_upload", Metadata={_WRITER: self._writer})
            self._upload = str(answer["UploadId"])
        number = len(self._parts) + 1
        try:
            answer = self._call("upload_part", UploadId=self._upload, PartNumber=number, Body=self._take_buffer())
        except FileNotFoundError as error:
            raise self._removed(error) from error
        checksums = {name: value for name, value in answer.items() if name.startswith("Checksum")}
        self._parts.append({"PartNumber": number, "ETag": answer["ETag"], **checksums})

    def _take_buffer(self) -> bytes:
        """As bytes, of which the client makes fewer copies than of a bytearray."""
        data = bytes(self._buffer)
        self._buffer = bytearray()
        return data

    def _removed(self, error: Exception) -> DataError:
        return DataError(f"{self._url}: the unfinished upload was removed while it ran ({service_code(error)})")

    def _writer_of_what_is_there(self) -> str | None:
        """None where there is no such file; "" for a file that carries no name."""
        try:
            return str(self._call("head_object")["Metadata"].get(_WRITER, ""))
        except FileNotFoundError:
            return None

    def _call(self, method: str, **arguments: Any) -> dict[str, Any]:
        with storage_errors(self._url):
            return dict(self._filesystem.call_s3(method, **self._file, **arguments))
