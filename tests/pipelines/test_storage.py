"""Storage, on a local directory and on a real S3 server: exclusive writes have one winner and leave no torn file."""

import hashlib
import pickle
import random
import resource
import tracemalloc
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blt.errors import ConfigError, DataError
from pipelines.filesystem import BLOCK_BYTES
from pipelines.new_file import NewFile
from pipelines.schema import DOCUMENT_SCHEMA, write_parquet
from pipelines.storage import TEMPORARY, Storage
from tests.s3_server import S3Server

SIZES = [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, 2 * BLOCK_BYTES + 1]
"""Nothing, one request, and uploads of one and of three parts."""


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return Storage(str(tmp_path / "root"))
    return Storage(request.getfixturevalue("s3").url(uuid.uuid4().hex))


def content(size: int) -> bytes:
    return random.Random(size).randbytes(size)


def in_pieces(data: bytes, piece_bytes: int = 3_000_000) -> Iterator[memoryview]:
    view = memoryview(data)
    return (view[start : start + piece_bytes] for start in range(0, len(data), piece_bytes))


def write(storage: Storage, path: str, data: bytes) -> NewFile:
    with storage.create(path) as new:
        for piece in in_pieces(data):
            new.write(piece)
    return new


def test_first_exclusive_write_wins(storage: Storage) -> None:
    assert storage.write_exclusive("a/b/c.bin", b"first")
    assert not storage.write_exclusive("a/b/c.bin", b"second")
    assert storage.read_bytes("a/b/c.bin") == b"first"
    with storage.open("a/b/c.bin") as file:
        assert file.read() == b"first"


@pytest.mark.parametrize("size", SIZES)
def test_created_file_is_whole_and_described(size: int, storage: Storage) -> None:
    data = content(size)
    new = write(storage, "a/shard", data)
    assert (new.created, new.size_bytes, new.sha256) == (True, size, hashlib.sha256(data).hexdigest())
    assert storage.sizes() == {"a/shard": size}
    assert storage.sha256("a/shard") == new.sha256
    again = write(storage, "a/shard", b"other" + data)
    assert not again.created
    assert storage.read_bytes("a/shard") == data
    assert storage.leftovers(0) == []


@pytest.mark.parametrize("size", SIZES)
def test_an_exception_discards_what_was_written(size: int, storage: Storage) -> None:
    def fail() -> None:
        with storage.create("shard") as new:
            new.write(content(size))
            assert storage.list() == []
            raise RuntimeError("the work failed")

    with pytest.raises(RuntimeError, match="the work failed"):
        fail()
    assert storage.list() == []
    assert storage.leftovers(0) == []


@pytest.mark.parametrize(
    ("size", "writers"),
    [
        (1000, 8),
        (BLOCK_BYTES + 1000, 4),
        *(pytest.param(n, 16, marks=pytest.mark.slow) for n in (1000, BLOCK_BYTES * 2)),
    ],
)
def test_race_has_one_winner_and_leaves_nothing_else(size: int, writers: int, storage: Storage) -> None:
    def create(number: int) -> bool:
        with pickle.loads(pickle.dumps(storage)).create("shard") as new:
            new.write(bytes([number]) * size)
        return bool(new.created)

    with ThreadPoolExecutor(writers) as pool:
        won = list(pool.map(create, range(writers)))
    found = storage.read_bytes("shard")
    assert won[found[0]]
    assert found == found[:1] * size
    # This server checks the condition of a multipart upload before it completes it, so that several may pass at once.
    assert sum(won) == 1 or (not storage.is_local and size > BLOCK_BYTES)
    assert storage.leftovers(0) == []


def test_parquet_streams_into_a_new_file(storage: Storage) -> None:
    def rows(number: int) -> pa.Table:
        text = content(BLOCK_BYTES // 2 + number)
        return pa.Table.from_pylist(
            [{"doc_id": str(number), "source": "s", "text": text, "n_bytes": len(text)}], schema=DOCUMENT_SCHEMA
        )

    with storage.create("shard.parquet") as new:
        write_parquet(new, map(rows, range(5)), DOCUMENT_SCHEMA, {})
    with storage.open("shard.parquet") as file:
        assert pq.ParquetFile(file).read().equals(pa.concat_tables(map(rows, range(5))))


def test_creating_and_hashing_take_the_memory_of_some_blocks(storage: Storage) -> None:
    block = content(BLOCK_BYTES)
    storage.write_exclusive("warm", b"")  # the client of the service
    tracemalloc.start()
    try:
        with storage.create("shard") as new:
            for _ in range(8):
                new.write(block)
        assert tracemalloc.get_traced_memory()[1] < 3 * BLOCK_BYTES
        assert storage.sha256("shard") == new.sha256
        assert tracemalloc.get_traced_memory()[1] < 6 * BLOCK_BYTES
    finally:
        tracemalloc.stop()


def test_reader_seeks(storage: Storage) -> None:
    data = content(3_000_000)
    storage.write_exclusive("file", data)
    with storage.open("file") as file:
        assert file.seek(-10, 2) == len(data) - 10
        assert file.read() == data[-10:]
        file.seek(7)
        assert file.read(2_500_000) == data[7:2_500_007]
        assert file.readline() == data[2_500_007:].partition(b"\n")[0] + b"\n"


def test_replace_takes_the_place_of_what_was_there(storage: Storage) -> None:
    storage.write_replace("record.json", b"1")
    storage.write_replace("record.json", b"22")
    assert storage.read_bytes("record.json") == b"22"
    assert storage.list() == ["record.json"]


def test_list_is_sorted_relative_and_deep(storage: Storage) -> None:
    for path in ("b/2", "a/1", "b/c/3", "bc/4"):
        storage.write_exclusive(path, b"x" * len(path))
    assert storage.list() == ["a/1", "b/2", "b/c/3", "bc/4"]
    assert storage.sizes("b") == {"b/2": 3, "b/c/3": 5}
    assert storage.list("nothing") == []


@pytest.mark.s3
@pytest.mark.slow
def test_list_follows_every_page(s3: S3Server) -> None:
    storage = Storage(s3.url(uuid.uuid4().hex))
    names = [f"{number:05d}" for number in range(2100)]
    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(lambda name: storage.write_exclusive(name, b""), names))
    assert storage.list() == names


def test_names_need_not_be_plain(storage: Storage) -> None:
    names = ["a b/ü?x=1&y #%.bin", "a+b/日本"]
    for name in names:
        assert storage.write_exclusive(name, name.encode())
        assert storage.exists(name)
        assert storage.read_bytes(name) == name.encode()
    assert storage.list() == sorted(names)


def test_exists_means_a_file(storage: Storage) -> None:
    assert not storage.exists("a/b")
    storage.write_exclusive("a/b", b"")
    assert storage.exists("a/b")
    assert not storage.exists("a")
    storage.delete("a/b")
    storage.delete("a/b")
    assert not storage.exists("a/b")


def test_missing_file_is_file_not_found_by_its_url(storage: Storage) -> None:
    for read in (storage.read_bytes, storage.open, storage.sha256):
        with pytest.raises(FileNotFoundError) as missing:
            read("nothing")
        assert missing.value.filename == storage.url("nothing")


@pytest.mark.parametrize("path", ["../outside", "a/../../outside", "/etc/passwd"])
def test_paths_stay_below_the_root(storage: Storage, path: str) -> None:
    with pytest.raises(ConfigError, match="leaves the dataset"):
        storage.write_exclusive(path, b"x")


@pytest.mark.parametrize("root", ["", "nosuchprotocol://bucket/x", "memory://x", "https://host/x", "s3://", "s3:///a"])
def test_unusable_root_is_a_config_error(root: str) -> None:
    with pytest.raises(ConfigError):
        Storage(root)


def test_leftovers_of_a_killed_writer_are_found_and_removed(storage: Storage) -> None:
    storage.write_exclusive("kept", b"data")
    killed = storage._target("a/shard")
    killed.write(memoryview(content(BLOCK_BYTES)))  # and then nothing more, as after kill -9
    (leftover,) = storage.leftovers(0)
    assert leftover.size_bytes == BLOCK_BYTES
    assert 0 <= leftover.age_seconds < 60
    assert storage.leftovers(60) == []
    assert storage.list() == ["kept"]
    storage.remove_leftovers([leftover])
    storage.remove_leftovers([leftover])
    assert storage.leftovers(0) == []
    assert storage.list() == ["kept"]


@pytest.mark.s3
def test_upload_that_was_removed_while_it_ran_says_so(s3: S3Server) -> None:
    storage = Storage(s3.url(uuid.uuid4().hex))

    def lose(last_piece: bytes) -> None:
        with storage.create("shard") as new:
            new.write(content(BLOCK_BYTES))
            storage.remove_leftovers(storage.leftovers(0))
            new.write(last_piece)

    for last_piece in (b"", b"x"):
        with pytest.raises(DataError, match="shard: the unfinished upload was removed while it ran"):
            lose(last_piece)
    assert storage.list() == []


@pytest.mark.s3
def test_leftovers_of_other_roots_are_left_alone(s3: S3Server) -> None:
    root = uuid.uuid4().hex
    other = Storage(s3.url(root + "-other"))._target("shard")
    other.write(memoryview(content(BLOCK_BYTES)))
    assert Storage(s3.url(root)).leftovers(0) == []
    assert len(Storage(s3.url(root + "-other")).leftovers(0)) == 1
    other.discard()


def test_closed_file_takes_nothing_more(storage: Storage) -> None:
    new = write(storage, "file", b"x")
    with pytest.raises(ValueError, match="closed"):
        new.write(b"y")


def test_failed_write_leaves_nothing(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # the kernel refuses as on a full disk: after a part
    try:
        with pytest.raises(OSError, match="too large"):
            storage.write_exclusive("shard", b"x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert storage.list() == []
    assert not (tmp_path / TEMPORARY).exists()


def test_file_in_the_place_of_a_directory_is_named(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.write_exclusive("a", b"x")
    with pytest.raises(OSError, match=r"File exists|Not a directory") as failure, storage.create("a/b") as new:
        new.write(b"y")
    assert failure.value.filename == storage.url("a")
    assert storage.list() == ["a"]


def test_relative_root_survives_a_change_of_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    storage = Storage("data")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    pickle.loads(pickle.dumps(storage)).write_exclusive("x", b"1")
    assert (tmp_path / "data" / "x").read_bytes() == b"1"
    assert storage.url("x") == str(tmp_path / "data" / "x")
