"""kill -9 of the whole job at any moment: run again, it ends with the bytes of an undisturbed run."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import ray  # noqa: F401

# isort: split
import psutil  # bundled with Ray, which puts it on the path

# isort: split

from tests.pipelines.shard.corpora import FORMATS, tree, write_texts
from tests.processes import kill_all, stops_when
from tests.waiting import wait_for

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

_SECONDS = 120


def _command(root: Path, output: Path) -> list[str]:
    settings = ["dedup=true", "valid_fraction=0.3", "group_bytes=3000", f"input={root}", f"output={output}"]
    return [sys.executable, "-m", "jobs", "shard", *settings]


def _kill_when(pattern: str, count: int, command: Sequence[str], output: Path) -> None:
    """Start the command and end all its processes at once when so many files match."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def stops() -> bool:
        assert process.poll() is None, "finished before it could be killed"
        return stops_when(process.pid, lambda: len(list(output.glob(pattern))) >= count and not _is_finished(output))

    wait_for(stops, f"{count} of {pattern}", seconds=_SECONDS)
    driver = psutil.Process(process.pid)
    children = driver.children(recursive=True)
    kill_all([driver, *children])
    process.wait()
    psutil.wait_procs(children, timeout=_SECONDS)


def _is_finished(output: Path) -> bool:
    return (output / "manifest.json").exists()


def test_kill_9_of_the_driver_in_each_pass(tmp_path: Path) -> None:
    for number in range(14):
        texts = [f"{i % 150} of {number % 3} " * 9 for i in range(60)]
        write_texts(tmp_path / "in", f"{number:02d}", FORMATS[number % 4], texts)
    (tmp_path / "in" / "bad.jsonl").write_text("broken\n" * 2000)
    subprocess.run(_command(tmp_path / "in", tmp_path / "whole"), check=True, capture_output=True, env=dict(os.environ))
    whole = tree(tmp_path / "whole")
    out = tmp_path / "out"
    command = _command(tmp_path / "in", out)
    for pattern, count in (("_dedup/runs/*.json", 3), ("_commits/*.json", 5)):
        _kill_when(pattern, count, command, out)
        assert not _is_finished(out)
    subprocess.run(command, check=True, capture_output=True)
    finished = tree(out)
    assert finished.keys() == whole.keys()
    assert {path for path in whole if whole[path] != finished[path]} <= {"job.json"}  # it says how long it took
