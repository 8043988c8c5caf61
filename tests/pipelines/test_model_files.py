"""Model directories on storage are fetched once, loaded from a local directory, and gone with the process."""

import subprocess
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from blt.errors import CheckpointError
from pipelines.model_files import local_model
from pipelines.storage import Storage
from tests.s3_server import S3Server

FILES = {"config.json": b"{}", "model.safetensors": b"w" * 1000, "entropy_model/config.json": b"{1}"}


def store(root: str) -> Storage:
    storage = Storage(root)
    for path, data in {**FILES, "job.json": b"not of the model"}.items():
        storage.write_replace(path, data)
    return storage


def test_local_directory_is_given_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert local_model("model") == str(tmp_path / "model")


@pytest.mark.s3
def test_files_are_fetched_once(s3: S3Server) -> None:
    storage = store(s3.url(uuid.uuid4().hex))
    with ThreadPoolExecutor(4) as pool:
        directories = set(pool.map(local_model, [storage.root_uri, f"{storage.root_uri}/"] * 2))
    (directory,) = directories
    found = {
        str(path.relative_to(directory)): path.read_bytes() for path in Path(directory).rglob("*") if path.is_file()
    }
    assert found == FILES
    storage.delete("config.json")
    assert local_model(storage.root_uri) == directory
    assert directory.endswith(storage.root_uri.removeprefix("s3://"))  # an error names a file in it


@pytest.mark.s3
@pytest.mark.slow
def test_copies_go_with_the_process(s3: S3Server) -> None:
    root = store(s3.url(uuid.uuid4().hex)).root_uri
    program = f"from pipelines.model_files import local_model; print(local_model({root!r}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert root.removeprefix("s3://") in done.stdout
    assert done.stderr == ""
    assert not Path(done.stdout.strip()).exists()


@pytest.mark.s3
def test_directory_without_a_model_is_named(s3: S3Server) -> None:
    root = s3.url(uuid.uuid4().hex)
    with pytest.raises(CheckpointError, match=f"{root}: is not the directory of a model: {root}/config.json"):
        local_model(root)
