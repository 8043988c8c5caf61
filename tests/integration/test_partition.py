"""A network that falls apart under a run on several hosts: the run goes on with those that are left, loses nothing and
counts nothing twice; a host that comes back takes part again.

A host that is cut off still has the shared directory, as machines that do not see each other may still see their S3.
"""

import contextlib
import functools
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import train
from jobs.configuration import to_plain
from pipelines.manifest import read_manifest
from pipelines.patch.commit import read_commits, read_plan
from pipelines.storage import Storage
from pipelines.train.metrics import read_metrics
from pipelines.train.timeline import Event, read_timeline
from tests import waiting
from tests.hosts import Host, Network, network
from tests.pipelines.patch.corpus import prose, write_documents
from tests.pipelines.train.tiny_run import assert_follows, expected_curve, tiny_job, told_steps, write_tiny_patches
from tests.ray_command import RAY_COMMAND

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 120.0
wait_for = functools.partial(waiting.wait_for, seconds=PATIENCE_SECONDS)
NUM_SHARDS = 24
NOTICE = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5",
}
"""Ray takes a silent node for dead after some 8 s instead of half a minute or more."""
STARTED = "Ray runtime started"
"""What a node's log says once it takes part."""
GIVEN_UP = "health check failed due to missing too many heartbeats"
"""What the head's log says of such a node."""


class Machines:
    """A head without CPUs on the first host, a node of one CPU on each of the others."""

    def __init__(self, hosts: Network, directory: Path) -> None:
        self._network, self._directory = hosts, directory
        self.head, *self.others = hosts.hosts
        self._start(self.head, "--head", "--num-cpus=0", "--include-dashboard=false")
        self._wait_until_started(self.head, times=1)
        self._given_up_before = 0
        self._nodes = {host: self._start_node(host) for host in self.others}
        for host in self.others:
            self._wait_until_started(host, times=1)

    def cut(self, host: Host) -> None:
        self._given_up_before = self._num_given_up()
        self._network.cut(host)

    def wait_until_given_up(self) -> None:
        """Until Ray takes the node that was cut off for dead."""
        wait_for(lambda: self._num_given_up() > self._given_up_before, "Ray to give up the node")

    def _num_given_up(self) -> int:
        (log,) = (self._directory / self.head.port).glob("session_2*/logs/gcs_server.out")
        return log.read_text().count(GIVEN_UP)

    def bring_back(self, host: Host) -> None:
        """Mend the cable. A node that was given up meanwhile ends when it hears of that; another takes its place."""
        self._network.mend(host)
        wait_for(lambda: self._nodes[host].poll() is not None, "the node that was given up to end by itself")
        times = self._log(host).read_text().count(STARTED)
        self._nodes[host] = self._start_node(host)
        self._wait_until_started(host, times + 1)

    @contextlib.contextmanager
    def command(self, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        """A command of ours on the head, with its work on the cluster; ended with the block."""
        environment = self._environment() | {"RAY_ADDRESS": f"{self.head.address}:6379"}
        command = self.head.command(sys.executable, "-m", "jobs", *arguments)
        with (
            (self._directory / "command.log").open("w") as log,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment) as process,
        ):
            try:
                yield process
            finally:
                process.kill()

    def result(self, command: subprocess.Popen[str]) -> dict[str, Any]:
        """What a command says at its end, which must be a good one."""
        out, _ = command.communicate(timeout=PATIENCE_SECONDS)
        assert command.returncode == 0, (self._directory / "command.log").read_text()[-3000:]
        result = json.loads(out.splitlines()[-1])
        assert isinstance(result, dict)
        return result

    def _wait_until_started(self, host: Host, times: int) -> None:
        wait_for(lambda: self._log(host).read_text().count(STARTED) >= times, f"the node on {host.address}")

    def _start_node(self, host: Host) -> subprocess.Popen[bytes]:
        return self._start(host, f"--address={self.head.address}:6379", "--num-cpus=1")

    def _start(self, host: Host, *options: str) -> subprocess.Popen[bytes]:
        common = (f"--node-ip-address={host.address}", "--object-store-memory=100000000", "--num-gpus=0")
        place = f"--temp-dir={self._directory / host.port}"
        command = host.command(*RAY_COMMAND, "start", "--block", *common, place, *options)
        with self._log(host).open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=self._environment())

    def _log(self, host: Host) -> Path:
        return self._directory / f"{host.port}.log"

    def _environment(self) -> dict[str, str]:
        own = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))}
        own |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT)}
        return own | NOTICE


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    directory = Path(tempfile.mkdtemp(prefix="blt-net-", dir="/tmp"))  # short: Ray puts sockets below it
    try:
        with network(3) as hosts:
            yield Machines(hosts, directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize("survival", ["sharded", "replicated"])
def test_train(survival: str, machines: Machines, tmp_path: Path) -> None:
    """Cut off from half of its workers, a sharded run starts again from its checkpoint with the other half, and a
    replicated one goes on with it; both take the host in again where it is back in time.
    """
    data, output, every = write_tiny_patches(tmp_path / "patches"), tmp_path / "run", 20
    loses_nothing = survival == "replicated"
    job = tiny_job(
        data,
        output,
        survival=survival,
        workers=2,
        min_workers=1,
        cpus_per_worker=1.0,
        steps=200,
        checkpoint_every=every,
        hang_seconds=20.0,  # longer than it takes Ray to give the node up, which is what ends the wait
        wait_for_resources=True,
    )
    config = train.Config(**vars(job.config), model=job.model, data=data, output=str(output))  # type: ignore[arg-type]
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(to_plain(config)))
    lost = machines.others[1]
    with machines.command("train", "--config", str(tmp_path / "train.yaml")) as command:
        wait_for(lambda: command.poll() is not None or len(told_steps(output)) >= every + 5, "steps of both")
        machines.cut(lost)
        wait_for(lambda: command.poll() is not None or told_steps(output)[-1].workers == 1, "a step without it")
        machines.wait_until_given_up()
        assert command.poll() is None, "the run was over too soon"
        machines.bring_back(lost)
        result = machines.result(command)
    assert_follows(output, expected_curve(job))
    sizes = [size for size, _ in itertools.groupby(step.workers for step in told_steps(output))]
    assert sizes[:2] == [2, 1]
    assert "failure" in {entry.cause for entry in read_timeline(str(output)) if isinstance(entry, Event)}
    assert result["steps"] == job.config.steps
    if loses_nothing:
        assert result["steps_redone"] == 0
    else:
        assert 0 < result["steps_redone"] <= 2 * every  # the newest checkpoint may not have been whole yet
    records = [record for record in read_metrics(output) if "train/bytes" in record]
    assert [record["step"] for record in records] == list(range(1, job.config.steps + 1)), "each step once"
    assert sum(record["train/bytes"] for record in records) == result["bytes"]


def test_patch(machines: Machines, tmp_path: Path) -> None:
    """The shard of a host that is cut off is done by another; what it makes meanwhile counts once."""
    texts = [prose(seed, 200_000) for seed in range(2)]
    shards = {f"train/shard-{i:05d}.parquet": texts for i in range(NUM_SHARDS)}
    documents = write_documents(tmp_path / "documents", shards)
    output = tmp_path / "patches"
    settings = ("rule.kind=space", "rule.max_patch_length=64", "row_group_bytes=4000", "min_actors=2", "max_actors=2")
    where = (f"documents={documents}", f"output={output}", "wait_for_resources=true")
    lost = machines.others[1]
    with machines.command("patch", *where, *settings) as command:
        wait_for(lambda: command.poll() is not None or len(list(output.glob("_commits/*"))) >= 4, "some shards")
        machines.cut(lost)
        machines.wait_until_given_up()
        assert command.poll() is None, "the shard of the lost host is missing"
        machines.bring_back(lost)
        result = machines.result(command)
    expected = {"documents": 2 * NUM_SHARDS, "bytes": 400_000 * NUM_SHARDS, "shards": NUM_SHARDS}
    assert {name: result[name] for name in expected} == expected
    manifest = read_manifest(str(output))
    assert (manifest.documents, manifest.bytes) == (expected["documents"], expected["bytes"])
    plan_hash, _ = read_plan(Storage(str(output)))
    commits = read_commits(Storage(str(output)), plan_hash).commits.values()
    assert sorted(commit.path for commit in commits) == sorted(shards)
    assert len({(commit.documents, commit.bytes, commit.patches) for commit in commits}) == 1, "equal documents"
    assert result["patches"] == NUM_SHARDS * next(iter(commits)).patches
