"""Filesystems of local paths and URIs, set up for long jobs: fresh listings, retries, timeouts, errors in one line.

Endpoint, region and credentials of S3 come from the environment or the usual AWS files of each machine, as for every
AWS tool; a URI that carries credentials is refused without repeating them.
"""

import contextlib
import errno
import io
import os
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

import aiohttp
import fsspec
from botocore.exceptions import BotoCoreError, ClientError, EndpointConnectionError, NoCredentialsError
from fsspec.implementations.local import LocalFileSystem

from blt.errors import ConfigError, DataError, StorageError

_S3_PROTOCOLS = ("s3", "s3a")

BLOCK_BYTES = 8 * 2**20
"""Read and written at once: a part of an upload, or a step of a stream."""

_READ_AHEAD_BYTES = 2**20
"""Least that one request of a reader asks for; larger reads are asked for as they are."""
_CONNECT_SECONDS, _READ_SECONDS = 10, 60
_ATTEMPTS = 7
"""Of one request; with the pauses between them they outlast an outage of about half a minute."""
_BODY_ATTEMPTS = 3
"""Of requests whose answer breaks off."""
_CONNECTIONS = 32

_CREDENTIAL = re.compile(r"[?&][^=&?/]*(key|secret|token|passw|credential|signature|sig)[^=&?/]*=", re.IGNORECASE)

_EXPLANATIONS = {
    "NoSuchBucket": "the bucket does not exist",
    "AccessDenied": "access denied: these credentials do not allow it",
    "403": "access denied: the server does not accept these credentials, or they do not allow it",
    "InvalidAccessKeyId": "the server does not know the access key id",
    "SignatureDoesNotMatch": "the secret access key is wrong",
    "ExpiredToken": "the credentials have expired",
    "InvalidToken": "the session token is wrong",
}


def resolve(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem of a local path or URI, and the path in it. No network is used.

    Listings are never cached, so that what another process wrote is seen. ConfigError for a URI that carries
    credentials, names no bucket, has a part .. on S3, or belongs to no installed filesystem.
    """
    refuse_credentials(uri)
    protocol, separator, place = uri.partition("://")
    on_s3 = bool(separator) and protocol in _S3_PROTOCOLS
    if on_s3 and not place.partition("/")[0]:
        raise ConfigError(f"{uri!r} names no bucket")
    if on_s3 and ".." in place.split("/"):
        raise ConfigError(f"{uri!r} has a part .., which is no directory above on S3")
    try:
        if not separator:  # a path, in which "::" has no meaning
            return LocalFileSystem(), str(LocalFileSystem._strip_protocol(uri))
        filesystem, path = fsspec.core.url_to_fs(uri, **(_s3_options() if on_s3 else {}))
    except (ValueError, ImportError) as error:
        raise ConfigError(f"cannot use {uri!r}: {error}") from error
    if on_s3:
        filesystem.retries = _BODY_ATTEMPTS
    return filesystem, str(path)


def is_s3(filesystem: fsspec.AbstractFileSystem) -> bool:
    protocol = filesystem.protocol
    return _S3_PROTOCOLS[0] in ((protocol,) if isinstance(protocol, str) else protocol)


def full_url(filesystem: fsspec.AbstractFileSystem, path: str) -> str:
    """The absolute local path or URI of a path in `filesystem`."""
    return path if isinstance(filesystem, LocalFileSystem) else str(filesystem.unstrip_protocol(path))


def open_reader(filesystem: fsspec.AbstractFileSystem, path: str) -> BinaryIO:
    """Seekable, buffered binary reader; errors of the service come as `storage_errors` makes them, while reading too.
    On S3, a file that is replaced while it is read is an error and never a mixture.
    """
    url = full_url(filesystem, path)
    with storage_errors(url):
        if isinstance(filesystem, LocalFileSystem):
            return open(path, "rb")
        file = filesystem.open(path, "rb", cache_type="none")
    return io.BufferedReader(_Reader(file, url), _READ_AHEAD_BYTES)


@contextlib.contextmanager
def storage_errors(url: str) -> Iterator[None]:
    """What fails inside leaves as one line that names `url`.

    FileNotFoundError for what is missing, OSError with the file's name for other errors of a local file system (a full
    disk), StorageError for a service that cannot be reached or keeps failing, DataError for one that refuses.
    """
    try:
        yield
    except (OSError, BotoCoreError, ClientError, aiohttp.ClientError) as error:
        if (translated := _translated(error, url)) is error:
            raise
        raise translated from error


def service_code(error: BaseException) -> str:
    """The error code that an S3 service answered with ("NoSuchBucket", "412", ...); "" if that is not the cause."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ClientError):
        cause = cause.__cause__
    return str(cause.response.get("Error", {}).get("Code", "")) if cause is not None else ""


def _translated(error: OSError | BotoCoreError | ClientError | aiohttp.ClientError, url: str) -> Exception:
    code = service_code(error)
    if isinstance(error, FileNotFoundError) and code != "NoSuchBucket":
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), error.filename or url)
    if code:
        if code in _EXPLANATIONS:
            return DataError(f"{url}: {_EXPLANATIONS[code]} ({code})")
        return StorageError(f"{url}: {_one_line(error)} ({code})")
    if isinstance(error, NoCredentialsError):
        return DataError(f"{url}: no credentials in the environment or the AWS files (AWS_ACCESS_KEY_ID, ...)")
    if isinstance(error, EndpointConnectionError):
        return StorageError(f"{url}: cannot connect to the endpoint of the service (AWS_ENDPOINT_URL)")
    if not isinstance(error, OSError) or isinstance(error, BotoCoreError | aiohttp.ClientError):
        return StorageError(f"{url}: {_one_line(error)}")
    if error.filename is None and error.errno is not None:
        return OSError(error.errno, error.strerror or _one_line(error), url)
    return error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def refuse_credentials(uri: str) -> None:
    """ConfigError, which does not repeat it, for a URI that carries credentials."""
    for authority in re.findall(r"://([^/]*)", uri):
        host, colon, port = authority.partition(":")
        if "@" in authority or (colon and host != "arn" and not port.isdigit()):
            _refuse(uri)
    if "://" in uri and _CREDENTIAL.search(uri):
        _refuse(uri)


def _refuse(uri: str) -> None:
    raise ConfigError(
        f"a URI that starts with {uri.partition('://')[0]}:// carries credentials: take them out; credentials and an "
        "endpoint are read from the environment or the usual AWS files"
    )


def _s3_options() -> dict[str, Any]:
    """Of s3fs. AWS_MAX_ATTEMPTS and AWS_RETRY_MODE keep their say; botocore itself passes over AWS_REGION."""
    retries: dict[str, Any] = {"mode": os.environ.get("AWS_RETRY_MODE", "standard")}
    if "AWS_MAX_ATTEMPTS" not in os.environ:
        retries["total_max_attempts"] = _ATTEMPTS
    region = os.environ.get("AWS_REGION")
    return {
        "use_listings_cache": False,
        "default_block_size": BLOCK_BYTES,
        "max_concurrency": 1,  # threads read and write many files at once; a file in pieces would multiply memory
        "client_kwargs": {"region_name": region} if region else {},
        "config_kwargs": {
            "connect_timeout": _CONNECT_SECONDS,
            "read_timeout": _READ_SECONDS,
            "retries": retries,
            "max_pool_connections": _CONNECTIONS,
        },
    }


class _Reader(io.RawIOBase):
    """A file of fsspec whose errors name its url."""

    def __init__(self, file: Any, url: str) -> None:
        self._file, self._url = file, url

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def readinto(self, buffer: Any, /) -> int:
        with storage_errors(self._url):
            return cast(int, self._file.readinto(buffer))

    def close(self) -> None:
        self._file.close()
        super().close()
