"""Storage: exclusive writes have one winner and leave no torn file."""

import pickle
import resource
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from blt.errors import ConfigError
from pipelines.storage import TEMPORARY, Storage


@pytest.fixture(params=["local", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "root") if request.param == "local" else f"memory://{uuid.uuid4().hex}")


def test_first_exclusive_write_wins(storage: Storage) -> None:
    assert storage.write_exclusive("a/b/c.bin", b"first")
    assert not storage.write_exclusive("a/b/c.bin", b"second")
    assert storage.read_bytes("a/b/c.bin") == b"first"
    with storage.open("a/b/c.bin") as file:
        assert file.read() == b"first"


def test_replace_takes_the_place_of_what_was_there(storage: Storage) -> None:
    storage.write_replace("record.json", b"1")
    storage.write_replace("record.json", b"22")
    assert storage.read_bytes("record.json") == b"22"


def test_list_is_sorted_relative_and_deep(storage: Storage) -> None:
    for path in ("b/2", "a/1", "b/c/3"):
        storage.write_exclusive(path, b"x")
    assert storage.list() == ["a/1", "b/2", "b/c/3"]
    assert storage.list("b") == ["b/2", "b/c/3"]
    assert storage.list("nothing") == []


def test_exists_means_a_file(storage: Storage) -> None:
    storage.write_exclusive("a/b", b"")
    assert storage.exists("a/b")
    assert not storage.exists("a")
    storage.delete("a/b")
    storage.delete("a/b")
    assert not storage.exists("a/b")


def test_missing_file_is_file_not_found(storage: Storage) -> None:
    with pytest.raises(FileNotFoundError):
        storage.read_bytes("nothing")


@pytest.mark.parametrize("path", ["../outside", "a/../../outside", "/etc/passwd"])
def test_paths_stay_below_the_root(storage: Storage, path: str) -> None:
    with pytest.raises(ConfigError, match="leaves the dataset"):
        storage.write_exclusive(path, b"x")


@pytest.mark.parametrize("root", ["", "nosuchprotocol://bucket/x"])
def test_unusable_root_is_a_config_error(root: str) -> None:
    with pytest.raises(ConfigError):
        Storage(root)


def test_race_has_one_winner_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    def write(number: int) -> bool:
        return Storage(str(tmp_path)).write_exclusive("shard", bytes([number]) * 100_000)

    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(write, range(16)))
    assert sum(won) == 1
    assert (tmp_path / "shard").read_bytes() == bytes([won.index(True)]) * 100_000
    assert list((tmp_path / TEMPORARY).iterdir()) == []


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


def test_relative_root_survives_a_change_of_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    storage = Storage("data")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    pickle.loads(pickle.dumps(storage)).write_exclusive("x", b"1")
    assert (tmp_path / "data" / "x").read_bytes() == b"1"
    assert storage.url("x") == str(tmp_path / "data" / "x")
