"""Storage under faults: real resets, lost answers and refusals before a real S3 server, and full local disks."""

import contextlib
import errno
import hashlib
import logging
import os
import random
import subprocess
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from blt.errors import DataError
from pipelines.filesystem import BLOCK_BYTES, resolve
from pipelines.new_file import NewFile
from pipelines.storage import Storage
from tests.fault_proxy import Fault, FaultProxy, Schedule, fault_proxy, first, seeded
from tests.s3_server import S3Server, s3_environment

SMALL, LARGE = 100_000, BLOCK_BYTES + 100_000
"""One request, and an upload in two parts."""


_connecting = threading.Lock()  # the environment is the process's, and tests connect in threads


def content(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


@contextlib.contextmanager
def behind_proxy(s3: S3Server, schedule: Schedule, attempts: int = 7) -> Iterator[tuple[Storage, FaultProxy]]:
    """A new root, reached through a proxy."""
    root = s3.url(uuid.uuid4().hex)
    with fault_proxy(s3.endpoint, schedule) as proxy:
        variables = {"AWS_ENDPOINT_URL": proxy.endpoint, "AWS_MAX_ATTEMPTS": str(attempts)}
        with _connecting, s3_environment({**s3.environment, **variables}):
            storage = Storage(root)
            resolve(root)[0].connect()  # keeps the endpoint from here on
        yield storage, proxy


def write(storage: Storage, path: str, data: bytes) -> NewFile:
    with storage.create(path) as new:
        new.write(data)
    return new


UPLOAD_REQUESTS = [("POST", "uploads"), ("PUT", "partNumber=1"), ("POST", "uploadId=")]


def in_threads(test: Callable[[Fault], None], faults: Iterable[Fault]) -> None:
    """Each fault by itself; at once, because clients wait between their attempts."""
    with ThreadPoolExecutor(len(Fault)) as pool:
        for _ in pool.map(test, faults):
            pass


@pytest.mark.s3
def test_single_request_survives_every_fault(s3: S3Server) -> None:
    data = content(SMALL)

    def create(fault: Fault) -> None:
        with behind_proxy(s3, first(fault, "PUT", "shard")) as (storage, proxy):
            new = write(storage, "shard", data)
            assert proxy.faults == {fault: 1}
            assert new.created, fault
            assert storage.read_bytes("shard") == data, fault
            assert storage.sizes() == {"shard": SMALL}, fault

    in_threads(create, Fault)


@pytest.mark.s3
@pytest.mark.parametrize(
    ("method", "part"),
    [*(pytest.param(*request, marks=pytest.mark.slow) for request in UPLOAD_REQUESTS[:-1]), UPLOAD_REQUESTS[-1]],
    ids=["start", "part", "complete"],
)
def test_upload_survives_every_fault_in_each_of_its_requests(method: str, part: str, s3: S3Server) -> None:
    data = content(LARGE)

    def create(fault: Fault) -> None:
        with behind_proxy(s3, first(fault, method, part)) as (storage, proxy):
            new = write(storage, "shard", data)
            assert proxy.faults == {fault: 1}
            assert new.created, fault
            assert storage.sha256("shard") == new.sha256 == hashlib.sha256(data).hexdigest(), fault
            assert storage.sizes() == {"shard": LARGE}, fault

    # Only what makes a file visible conflicts with other writers.
    in_threads(create, [fault for fault in Fault if part == "uploadId=" or fault is not Fault.CONFLICT])


@pytest.mark.s3
@pytest.mark.parametrize(
    ("size", "method", "part"), [(SMALL, "PUT", "shard"), (LARGE, *UPLOAD_REQUESTS[-1])], ids=["put", "complete"]
)
def test_lost_answer_does_not_make_a_loser_a_winner(size: int, method: str, part: str, s3: S3Server) -> None:
    with behind_proxy(s3, first(Fault.LOSE_RESPONSE, method, part)) as (storage, proxy):
        assert write(Storage(storage.root_uri), "shard", b"first").created  # not through the proxy
        assert not write(storage, "shard", content(size)).created
        assert proxy.faults == {Fault.LOSE_RESPONSE: 1}
        assert storage.read_bytes("shard") == b"first"
        assert storage.leftovers(0) == []


@pytest.mark.slow
@pytest.mark.s3
def test_reading_survives_every_fault(s3: S3Server) -> None:
    data = content(LARGE)

    def read(fault: Fault) -> None:
        with behind_proxy(s3, first(fault, "GET", "shard", times=2)) as (storage, proxy):
            write(storage, "shard", data)
            assert storage.read_bytes("shard") == data, fault
            with storage.open("shard") as file:
                file.seek(1000)
                assert file.read(LARGE) == data[1000:], fault
            assert proxy.faults == {fault: 2}

    in_threads(read, [fault for fault in Fault if fault is not Fault.CONFLICT])


@pytest.mark.s3
def test_service_that_keeps_failing_is_an_error_of_one_line(s3: S3Server) -> None:
    with behind_proxy(s3, lambda method, path, attempt: Fault.INTERNAL, attempts=1) as (storage, _):
        for use in (storage.read_bytes, storage.exists, lambda path: storage.write_exclusive(path, b"")):
            with pytest.raises(DataError, match=rf"{storage.url('x')}: .*(InternalError|500)"):
                use("x")


@pytest.mark.s3
@pytest.mark.parametrize("method", ["PUT", "POST"])
def test_upload_that_fails_is_taken_back(method: str, s3: S3Server, caplog: pytest.LogCaptureFixture) -> None:
    failing = first(Fault.INTERNAL, method, "uploadId=", times=100)
    with behind_proxy(s3, failing, attempts=1) as (storage, _):
        with caplog.at_level(logging.WARNING), pytest.raises(DataError, match=r"shard: .*InternalError"):
            write(storage, "shard", content(LARGE))
        assert storage.list() == []
        assert storage.leftovers(0) == []
    assert "left behind" not in caplog.text


@pytest.mark.s3
def test_upload_that_cannot_be_taken_back_is_logged_and_found_later(
    s3: S3Server, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(method: str, path: str, attempt: int) -> Fault | None:
        return Fault.INTERNAL if "uploadId=" in path and method in ("POST", "DELETE") else None

    with behind_proxy(s3, failing, attempts=1) as (storage, _):
        with caplog.at_level(logging.WARNING), pytest.raises(DataError, match=r"shard: .*InternalError"):
            write(storage, "shard", content(LARGE))
        assert [leftover.size_bytes for leftover in storage.leftovers(0)] == [LARGE]
    assert "unfinished upload left behind" in caplog.text


@pytest.mark.s3
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", [SMALL, LARGE], ids=["put", "multipart"])
def test_race_through_faults_has_a_winner_whose_file_it_is(size: int, seed: int, s3: S3Server) -> None:
    def create(number: int) -> bool:
        return write(storage, "shard", bytes([number]) * size).created

    with behind_proxy(s3, seeded(seed, rate=0.3)) as (storage, proxy):
        with ThreadPoolExecutor(16) as pool:
            won = list(pool.map(create, range(16)))
        found = storage.read_bytes("shard")
        assert sum(proxy.faults.values()) >= 3
    assert won[found[0]]
    assert found == found[:1] * size
    # This server checks the condition of a multipart upload before it completes it, so that several may pass at once.
    assert sum(won) == 1 or size == LARGE
    assert Storage(storage.root_uri).sizes() == {"shard": size}


@pytest.mark.s3
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_operation_many_times_through_faults(s3: S3Server) -> None:
    def use(number: int) -> None:
        data = content(LARGE if number % 10 == 0 else SMALL, number)
        path = f"{number % 7}/{number}"
        assert write(storage, path, data).created
        assert not storage.write_exclusive(path, b"other")
        assert storage.read_bytes(path) == data
        assert storage.sha256(path) == hashlib.sha256(data).hexdigest()
        assert storage.exists(path)
        assert storage.sizes(f"{number % 7}")[path] == len(data)
        storage.write_replace(f"records/{number}", b"1")
        storage.write_replace(f"records/{number}", data[:100])
        assert storage.read_bytes(f"records/{number}") == data[:100]
        if number % 2:
            storage.delete(path)
            assert not storage.exists(path)
        storage.remove_leftovers(storage.leftovers(600))

    with behind_proxy(s3, seeded(5, rate=0.1)) as (storage, proxy):
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(use, range(150)))
        assert set(proxy.faults) == set(Fault) - {Fault.CONFLICT}
    kept = {path for path in Storage(storage.root_uri).list() if not path.startswith("records/")}
    assert kept == {f"{number % 7}/{number}" for number in range(0, 150, 2)}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(directory)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
    yield directory
    subprocess.run(["umount", str(directory)], check=True)


@pytest.mark.parametrize("operation", ["create", "write_exclusive", "write_replace"])
@pytest.mark.parametrize("size", [2**20 + 1, 4 * 2**20])
def test_full_disk_is_named_and_leaves_nothing(operation: str, size: int, small_disk: Path) -> None:
    storage = Storage(str(small_disk / "data"))
    storage.write_replace("shard" if operation == "write_replace" else "other", b"before")
    before = files(small_disk)
    data = content(size)
    operations = {
        "create": lambda: write(storage, "shard", data),
        "write_exclusive": lambda: storage.write_exclusive("shard", data),
        "write_replace": lambda: storage.write_replace("shard", data),
    }
    with pytest.raises(OSError, match="No space left") as failure:
        operations[operation]()
    assert failure.value.errno == errno.ENOSPC
    assert failure.value.filename == storage.url("shard")
    assert files(small_disk) == before
    assert storage.write_exclusive("fits", content(1000))


def files(directory: Path) -> dict[str, bytes]:
    found = (Path(parent) / name for parent, _, names in os.walk(directory) for name in names)
    return {str(path.relative_to(directory)): path.read_bytes() for path in found}
