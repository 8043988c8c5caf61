"""Exactly once, whatever dies: actors, drivers, a node, the disk, S3. Afterwards the data files are those of an
undisturbed run, byte for byte, and each shard has one record.
"""

import contextlib
import dataclasses
import functools
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

# isort: split
import psutil  # bundled with Ray, which puts it on the path

# isort: split

from blt.patching import PatchRule
from pipelines.manifest import Manifest, read_manifest
from pipelines.patch import PatchConfig, patch_dataset
from pipelines.patch.commit import read_commits, read_plan
from pipelines.patch.status import dataset_status
from pipelines.storage import Storage
from tests import waiting
from tests.fault_proxy import fault_proxy, seeded
from tests.pipelines.patch.corpus import prose, write_documents
from tests.pipelines.patch.in_process import use_in_process_pool
from tests.processes import stops_when
from tests.raylets import raylets
from tests.s3_server import S3Server, s3_environment
from tests.small_disk import small_disk

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(400)]

NUM_SHARDS, NUM_ACTORS = 6, 2
CONFIG = PatchConfig(
    rule=PatchRule(threshold=4.0, max_patch_length=64),
    row_group_bytes=20_000,
    max_actors=NUM_ACTORS,
    stall_seconds=120.0,
)
PATIENCE_SECONDS = 120.0
wait_for = functools.partial(waiting.wait_for, seconds=PATIENCE_SECONDS)


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Six shards that take about a second each."""
    shards = {f"train/shard-{i:05d}.parquet": [prose(100 * i + j, 20_000) for j in range(5)] for i in range(NUM_SHARDS)}
    return write_documents(tmp_path_factory.mktemp("faults") / "documents", shards)


@pytest.fixture(scope="module")
def undisturbed(
    documents: str, entropy_model_directory: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """The data files of a run in this process."""
    output = tmp_path_factory.mktemp("undisturbed") / "patches"
    with pytest.MonkeyPatch.context() as patched:
        use_in_process_pool(patched)
        patch_dataset(CONFIG, documents, entropy_model_directory, str(output))
    return _data_files(Storage(str(output)))


def _data_files(storage: Storage) -> dict[str, bytes]:
    return {path: storage.read_bytes(path) for path in storage.list() if path.endswith(".parquet")}


def _assert_whole(storage: Storage, manifest: Manifest | None, undisturbed: dict[str, bytes]) -> None:
    """The dataset is the undisturbed one, its manifest complete, its records one for each shard."""
    assert manifest is not None
    assert manifest == read_manifest(storage.root_uri)
    assert len(manifest.shards) == NUM_SHARDS
    assert _data_files(storage) == undisturbed
    plan_hash, _ = read_plan(storage)
    assert sorted(c.path for c in read_commits(storage, plan_hash).commits.values()) == sorted(undisturbed)


def _names(directory: Path) -> list[str]:
    """What is in a directory that comes and goes: a glob fails when it goes between its two looks (Python 3.11)."""
    try:
        return os.listdir(directory)
    except FileNotFoundError:
        return []


def _is_inside_a_shard(output: Path) -> bool:
    """Whether one shard is done and another is being written."""
    return bool(_names(output / "_commits") and _names(output / "_temporary"))


def _actors(of: int | None = None) -> list[psutil.Process]:
    """Patch actors below a process, by default this one."""
    return [process for process in psutil.Process(of).children(recursive=True) if _is_actor(process)]


def _is_actor(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return "PatchActor" in " ".join(process.cmdline())
    return False


@contextlib.contextmanager
def _driver(documents: str, model: str, output: str) -> Iterator[subprocess.Popen[str]]:
    """`blt patch` in a process of its own, with a Ray of its own; ended with the block."""
    settings = [
        f"documents={documents}",
        f"entropy_model={model}",
        f"output={output}",
        "rule.threshold=4.0",
        "rule.max_patch_length=64",
        f"row_group_bytes={CONFIG.row_group_bytes}",
        f"max_actors={NUM_ACTORS}",
    ]
    command = [sys.executable, "-m", "jobs", "patch", *settings]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield driver
    finally:
        driver.kill()
        driver.communicate()


def _stops_with_shards_left(driver: subprocess.Popen[str], output: Path) -> bool:
    """Whether it stops while some shards are done and there are more than one for each actor, which go on alone."""
    assert driver.poll() is None, driver.communicate()[0]
    return stops_when(
        driver.pid,
        lambda: _is_inside_a_shard(output) and len(_names(output / "_commits")) < NUM_SHARDS - NUM_ACTORS,
    )


def _kill(driver: subprocess.Popen[str]) -> None:
    """kill -9 of a driver alone: its actors end with it. (Ray's agents, which write nothing, take a minute more.)"""
    actors = _actors(driver.pid)
    driver.kill()
    driver.wait()
    assert not psutil.wait_procs(actors, timeout=PATIENCE_SECONDS)[1], "actors that outlive their driver"


@pytest.mark.usefixtures("ray_local")
def test_kill_9_of_an_actor_inside_a_shard(
    documents: str, entropy_model_directory: str, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "patches"
    killed: list[int] = []
    finished: list[int] = []

    def kill_one() -> None:
        wait_for(lambda: bool(_names(output / "_commits")), "the first shard")
        wait_for(lambda: len(_actors()) == 1, "actors of earlier runs to end")
        (actor,) = _actors()
        wait_for(lambda: stops_when(actor.pid, lambda: bool(_names(output / "_temporary"))), "the actor inside a shard")
        actor.kill()
        killed.append(actor.pid)

    killer = threading.Thread(target=kill_one)
    killer.start()
    config = dataclasses.replace(CONFIG, max_actors=1)
    manifest = patch_dataset(config, documents, entropy_model_directory, str(output), finished.append)
    killer.join()
    assert len(killed) == 1
    assert len(finished) == 1 + NUM_SHARDS, "what was found finished, and each shard once"
    assert manifest is not None
    assert sum(finished) == manifest.bytes
    storage = Storage(str(output))
    _assert_whole(storage, manifest, undisturbed)
    assert len(storage.leftovers(0)) == 1, "the killed actor was inside a shard"
    storage.remove_leftovers(storage.leftovers(0))
    assert storage.leftovers(0) == []


def test_kill_9_of_the_driver(
    documents: str, entropy_model_directory: str, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "patches"
    with _driver(documents, entropy_model_directory, str(output)) as driver:
        wait_for(lambda: _stops_with_shards_left(driver, output), "the driver's actors to be inside a shard")
        _kill(driver)
    status = dataset_status(documents, str(output))
    assert 0 < len(status.done.commits) < NUM_SHARDS
    assert not status.complete
    with _driver(documents, entropy_model_directory, str(output)) as driver:
        said, _ = driver.communicate(timeout=PATIENCE_SECONDS)
    assert driver.returncode == 0, said
    _assert_whole(Storage(str(output)), read_manifest(str(output)), undisturbed)


def test_two_drivers_on_one_output(
    documents: str, entropy_model_directory: str, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    output = str(tmp_path / "patches")
    with (
        _driver(documents, entropy_model_directory, output) as one,
        _driver(documents, entropy_model_directory, output) as two,
    ):
        said = [driver.communicate(timeout=PATIENCE_SECONDS)[0] for driver in (one, two)]
    assert (one.returncode, two.returncode) == (0, 0), said
    _assert_whole(Storage(output), read_manifest(output), undisturbed)
    assert Storage(output).leftovers(0) == []


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """Two nodes of one CPU."""
    with raylets(head_cpus=1, nodes=1) as cluster:
        yield cluster


def test_loss_of_a_node(
    cluster: Cluster, documents: str, entropy_model_directory: str, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "patches"
    lost: list[int] = []

    def lose_second_node() -> None:
        wait_for(lambda: _is_inside_a_shard(output), "an actor to be inside a shard")
        second = next(iter(cluster.worker_nodes))
        raylet = second.all_processes["raylet"][0].process
        raylet.kill()  # its actors end with it
        lost.append(raylet.pid)

    killer = threading.Thread(target=lose_second_node)
    killer.start()
    manifest = patch_dataset(CONFIG, documents, entropy_model_directory, str(output))
    killer.join()
    assert len(lost) == 1
    _assert_whole(Storage(str(output)), manifest, undisturbed)


@pytest.fixture
def full_soon(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", 200) as disk:
        yield disk


def test_a_full_disk(
    documents: str,
    entropy_model_directory: str,
    undisturbed: dict[str, bytes],
    full_soon: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_in_process_pool(monkeypatch)
    storage = Storage(str(full_soon / "patches"))
    with pytest.raises(Exception, match="No space left on device"):
        patch_dataset(CONFIG, documents, entropy_model_directory, storage.root_uri)
    done = set(_data_files(storage))
    assert 0 < len(done) < NUM_SHARDS
    assert storage.leftovers(0) == [], "what did not fit takes no room"
    assert not storage.exists("manifest.json")
    subprocess.run(["mount", "-o", "remount,size=16m", full_soon], check=True)
    manifest = patch_dataset(CONFIG, documents, entropy_model_directory, storage.root_uri)
    _assert_whole(storage, manifest, undisturbed)


@pytest.mark.s3
def test_s3_that_fails_and_dawdles(
    documents: str,
    entropy_model_directory: str,
    undisturbed: dict[str, bytes],
    s3: S3Server,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A third of all requests meets resets, lost answers, 500, 503 or delays; the client asks again."""
    use_in_process_pool(monkeypatch)
    root = s3.url("patch-faults")
    with (
        fault_proxy(s3.endpoint, seeded(seed=3, rate=0.3)) as proxy,
        s3_environment({**s3.environment, "AWS_ENDPOINT_URL": proxy.endpoint}),
    ):
        manifest = patch_dataset(CONFIG, documents, entropy_model_directory, root)
        assert sum(proxy.faults.values()) > 5
    _assert_whole(Storage(root), manifest, undisturbed)
    assert Storage(root).leftovers(0) == []


@pytest.mark.s3
def test_kill_9_of_a_driver_that_writes_to_s3(
    documents: str, entropy_model_directory: str, undisturbed: dict[str, bytes], s3: S3Server
) -> None:
    storage = Storage(s3.url("patch-killed"))
    with _driver(documents, entropy_model_directory, storage.root_uri) as driver:
        wait_for(lambda: any(path.startswith("train/") for path in storage.list()), "the first shard")
        _kill(driver)
    with _driver(documents, entropy_model_directory, storage.root_uri) as driver:
        said, _ = driver.communicate(timeout=PATIENCE_SECONDS)
    assert driver.returncode == 0, said
    _assert_whole(storage, read_manifest(storage.root_uri), undisturbed)
