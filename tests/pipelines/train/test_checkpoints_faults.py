"""Checkpoints under faults: kills in the middle of a save, a full disk, S3 that fails. What was whole before stays, and
what is not whole is never taken for it.
"""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from blt.errors import CheckpointError
from pipelines.storage import Storage
from pipelines.train import checkpoint_files
from pipelines.train.checkpoints import Checkpoints, Loaded
from tests.fault_proxy import Fault, Schedule, fault_proxy, seeded
from tests.pipelines.train.checkpoint_cases import RUN, assert_equal, directory, files, saved, tensors, zeros
from tests.s3_server import S3Server, s3_environment
from tests.small_disk import small_disk


@pytest.fixture
def full_soon(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", 600) as disk:
        yield disk


def test_a_full_disk(full_soon: Path) -> None:
    """What fails leaves nothing, not even of the same step; what was there stays."""
    checkpoints = saved(full_soon, 10, 20)
    before = {path: (full_soon / path).read_bytes() for path in files(full_soon)}
    large = tensors(0, scale=20_000)
    for step in (20, 30):
        with pytest.raises(CheckpointError, match=rf"step-000000{step}: cannot be written: .*No space left on device"):
            checkpoints.save(step, large, {}, wait=True)
        assert {path: (full_soon / path).read_bytes() for path in files(full_soon)} == before
    assert checkpoints.load_newest(zeros(tensors(0))) == Loaded(20, {"steps_done": 20}, [])
    checkpoints.save(30, tensors(30), {}, wait=True)
    assert checkpoints.steps() == [30, 20, 10]


SAVE_UNTIL_KILLED = f"""
import itertools, sys, torch
from pipelines.train.checkpoints import Checkpoints
checkpoints = Checkpoints(sys.argv[1], {RUN!r}, 2)
for step in itertools.count(10, 10):
    tensors = {{f"{{kind}}.w": torch.full((500_000,), float(step)) for kind in ("model", "exp_avg", "exp_avg_sq")}}
    checkpoints.save(step, tensors, {{"steps_done": step}}, wait=False)
"""


def is_between_two_files(root: Path) -> bool:
    """A checkpoint's four files are there, and one of the next, others are not."""
    return len(_names(root, "step-")) > 4 and len(_names(root, "_temporary/")) > 0


def is_before_the_record(root: Path) -> bool:
    """All files of a later checkpoint are there, but not its record."""
    steps = _names(root, f"checkpoints/{RUN}/step-")
    newest = [name for name in steps if name.startswith(max(steps).rpartition("/")[0])] if steps else []
    return len(newest) == 3 and len(steps) > 3 and not any(name.endswith("complete.json") for name in newest)


def _names(root: Path, part: str) -> list[str]:
    """Of the files below the root whose path holds `part`; directories come and go meanwhile."""
    paths = (os.path.join(place, name) for place, _, names in os.walk(root) for name in names)
    return [path for path in (os.path.relpath(path, root) for path in paths) if part in path]


@pytest.mark.slow
@pytest.mark.parametrize("moment", [is_between_two_files, is_before_the_record])
def test_a_kill_in_the_middle_of_a_save(tmp_path: Path, moment: Callable[[Path], bool]) -> None:
    targets = {f"{kind}.w": torch.zeros(500_000) for kind in ("model", "exp_avg", "exp_avg_sq")}
    kill_when(moment, tmp_path)
    checkpoints = Checkpoints(str(tmp_path), RUN, 2)
    loaded = checkpoints.load_newest(targets)
    assert loaded is not None
    assert loaded.passed_over == []
    assert all(torch.equal(tensor, torch.full_like(tensor, loaded.step)) for tensor in targets.values())
    for step in range(loaded.step + 10, loaded.step + 50, 10):
        checkpoints.save(step, targets, {"steps_done": step}, wait=True)
    assert len(list(directory(tmp_path, 0).parent.iterdir())) == 2
    assert len(_names(tmp_path, "step-")) == 8


def kill_when(moment: Callable[[Path], bool], root: Path) -> None:
    """Save one checkpoint after the other in another process, which is killed at the moment."""
    process = subprocess.Popen([sys.executable, "-c", SAVE_UNTIL_KILLED, str(root)])
    try:
        deadline = time.monotonic() + 60
        while not moment(root):
            assert process.poll() is None
            assert time.monotonic() < deadline
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


@pytest.mark.s3
def test_on_s3(s3: S3Server) -> None:
    root = s3.url(uuid.uuid4().hex)
    checkpoints = saved(root, 10, 20, 30, keep=2)
    assert checkpoints.steps() == [30, 20]
    found = zeros(tensors(0))
    assert checkpoints.load_newest(found) == Loaded(30, {"steps_done": 30}, [])
    assert_equal(found, tensors(30))
    storage = Storage(root)
    path = next(path for path in storage.list("checkpoints") if "step-00000030/model" in path)
    storage.write_replace(path, storage.read_bytes(path)[:-1])
    loaded = checkpoints.load_newest(found)
    assert loaded is not None
    assert loaded.step == 20
    assert f"{root}/{path}: holds" in loaded.passed_over[0]


def behind(s3: S3Server, schedule: Schedule, root: str, work: Callable[[str], object], attempts: int = 7) -> int:
    """Do `work` on the root through a proxy; the number of faults that it met."""
    with fault_proxy(s3.endpoint, schedule) as proxy:
        variables = {"AWS_ENDPOINT_URL": proxy.endpoint, "AWS_MAX_ATTEMPTS": str(attempts)}
        with s3_environment({**s3.environment, **variables}):
            work(root)
    return sum(proxy.faults.values())


@pytest.mark.s3
@pytest.mark.slow
def test_s3_that_fails_a_third_of_all_requests(s3: S3Server) -> None:
    root, found = s3.url(uuid.uuid4().hex), zeros(tensors(0))

    def work(root: str) -> None:
        checkpoints = saved(root, 10, 20, 30, keep=2)
        assert checkpoints.load_newest(found) == Loaded(30, {"steps_done": 30}, [])

    assert behind(s3, seeded(5, 0.3), root, work) > 5
    assert_equal(found, tensors(30))
    assert Checkpoints(root, RUN, 2).steps() == [30, 20]
    assert Storage(root).leftovers(0) == []


@pytest.mark.s3
@pytest.mark.slow
def test_s3_that_takes_no_more_data(s3: S3Server) -> None:
    """Each file by itself: the checkpoint before stays, and nothing of the new one."""
    root = s3.url(uuid.uuid4().hex)
    saved(root, 10, keep=2)
    before = Storage(root).sizes()
    for part in ("model-", "step-0", "complete.json"):

        def refuse(method: str, path: str, attempt: int, part: str = part) -> Fault | None:
            return Fault.SLOW_DOWN if method == "PUT" and part in path else None

        def work(root: str) -> None:
            with pytest.raises(CheckpointError, match=r"step-00000020: cannot be written: rank 0: s3://.*SlowDown"):
                saved(root, 20, keep=2)

        assert behind(s3, refuse, root, work, attempts=1) > 0
        assert Storage(root).sizes() == before
    assert Checkpoints(root, RUN, 2).load_newest(zeros(tensors(0))) == Loaded(10, {"steps_done": 10}, [])


@pytest.mark.s3
def test_a_lost_answer_to_the_last_write(s3: S3Server) -> None:
    """The record is there though its writer was told that it is not: what failed must not look whole."""
    root = s3.url(uuid.uuid4().hex)
    saved(root, 10, keep=2)

    def lose(method: str, path: str, attempt: int) -> Fault | None:
        return Fault.LOSE_RESPONSE if method == "PUT" and path.endswith("complete.json") else None

    def work(root: str) -> None:
        with pytest.raises(CheckpointError, match="step-00000020: cannot be written"):
            saved(root, 20, keep=2)

    assert behind(s3, lose, root, work, attempts=1) > 0
    assert Checkpoints(root, RUN, 2).steps() == [10]
    assert [path for path in Storage(root).list() if "step-00000020" in path] == []


@pytest.mark.s3
@pytest.mark.slow
def test_a_large_file_on_s3(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uploaded in several blocks, read in several requests."""
    monkeypatch.setattr(checkpoint_files, "READ_BYTES", 2**20)
    root = s3.url(uuid.uuid4().hex)
    large = {"model.w": torch.randn(3000, 1500)}
    checkpoints = Checkpoints(root, RUN, 2)
    checkpoints.save(1, large, {}, wait=False)
    found = {"model.w": torch.zeros(3000, 1500)}
    checkpoints.wait()
    checkpoints.load_newest(found)
    assert_equal(found, large)
