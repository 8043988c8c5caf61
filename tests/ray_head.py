"""A Ray cluster with a job server, as `ray start --head` makes it: on loopback, ended by its own pids.

It has one node, or with an autoscaler (version 2, as in infra/kuberay) as many as are asked for: further raylets here,
which Ray's provider for tests starts and ends in place of a cloud's machines. `ray.cluster_utils.AutoscalingCluster`
is not used, since its `ray stop` ends every Ray on the machine.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import ray  # noqa: F401
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

# isort: split
import psutil  # bundled with Ray, which puts it on the path

# isort: split

from blt.errors import ClusterError
from jobs.cluster.access import asks_for_token
from jobs.cluster.address import parse_address
from tests.ports import RAY_PORTS, free_ports
from tests.processes import kill_all
from tests.ray_command import RAY_COMMAND

_SECONDS_TO_START = 150
_PORTS = (
    "port",
    "dashboard-port",
    "ray-client-server-port",
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "metrics-export-port",
    "runtime-env-agent-port",
    "node-manager-port",
    "object-manager-port",
)


_FAKE_NODES = {
    "RAY_FAKE_CLUSTER": "1",
    "RAY_enable_autoscaler_v2": "1",
    "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
}
"""What Ray's provider for tests must find in the environment of the head."""


@dataclass(frozen=True, kw_only=True)
class RayHead:
    """A running cluster."""

    address: str
    """http://127.0.0.1:PORT of its job server."""
    gcs_address: str
    """127.0.0.1:PORT, what RAY_ADDRESS names."""
    directory: Path
    """Its temporary directory, with the logs."""


@dataclass(frozen=True, kw_only=True)
class Autoscaler:
    """Which nodes may be added to the head."""

    node_resources: Mapping[str, float]
    """Of a node, by Ray's names: CPU, GPU, object_store_memory, ..."""
    max_nodes: int
    idle_seconds: float
    """After which a node that nothing runs on is ended."""


@contextlib.contextmanager
def ray_head(
    environment: Mapping[str, str], num_cpus: int = 4, autoscaler: Autoscaler | None = None
) -> Iterator[RayHead]:
    """A cluster whose processes have these variables and no others of Ray or AWS; ended with the block."""
    bin_directory = str(Path(sys.executable).parent)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_", "PYTHONPATH"))}
    kept["PATH"] = os.pathsep.join([bin_directory, kept.get("PATH", "")])
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}
    directory = Path(tempfile.mkdtemp(prefix="blt-head-", dir="/tmp"))  # short: Ray puts sockets below it
    ports = dict(zip(_PORTS, free_ports(len(_PORTS), RAY_PORTS), strict=True))
    command = [
        *(*RAY_COMMAND, "start", "--head", "--block", "--include-dashboard=true"),
        *("--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--num-cpus={num_cpus}", "--num-gpus=0"),
        *("--object-store-memory=150000000", "--min-worker-port=0", "--max-worker-port=0", f"--temp-dir={directory}"),
        *(f"--{name}={port}" for name, port in ports.items()),
    ]
    gcs_address = f"127.0.0.1:{ports['port']}"
    if autoscaler is not None:
        file = directory / "autoscaler.json"
        file.write_text(json.dumps(_autoscaling(autoscaler, gcs_address, num_cpus)))
        command.append(f"--autoscaling-config={file}")
        quiet |= _FAKE_NODES
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=kept | quiet | dict(environment))
    address = f"http://127.0.0.1:{ports['dashboard-port']}"
    try:
        _wait_until_ready(process, address, directory / "log")
        yield RayHead(address=address, gcs_address=gcs_address, directory=directory)
    finally:
        _end(process)
        shutil.rmtree(directory, ignore_errors=True)


def _autoscaling(autoscaler: Autoscaler, gcs_address: str, num_cpus: int) -> dict[str, object]:
    """The configuration of the autoscaler, with all that `ray up` would have filled in."""
    provider = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
    lists = ("cluster_synced_files", "initialization_commands", "rsync_exclude", "rsync_filter", "setup_commands")
    lists = (
        *lists,
        *(f"{kind}_{which}" for kind in ("head", "worker") for which in ("setup_commands", "start_ray_commands")),
    )
    return {
        "cluster_name": "tests",
        "max_workers": autoscaler.max_nodes,
        "idle_timeout_minutes": autoscaler.idle_seconds / 60,
        "provider": {
            "type": "external",
            "module": provider,
            "gcs_address": gcs_address,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "launch_multiple": True,
        },
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": num_cpus}, "node_config": {}, "max_workers": 0},
            "added": {
                "resources": dict(autoscaler.node_resources),
                "node_config": {},
                "min_workers": 0,
                "max_workers": autoscaler.max_nodes,
            },
        },
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        **{name: list[str]() for name in lists},
    }


def _wait_until_ready(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline = time.monotonic() + _SECONDS_TO_START
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"ray start ended with {process.returncode}: {log.read_text()[-2000:]}")
        try:
            asks_for_token(parse_address("address", address))
        except ClusterError:
            time.sleep(0.1)  # not listening yet
        else:
            return
    raise TimeoutError(f"the job server did not start within {_SECONDS_TO_START} s: {log.read_text()[-2000:]}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill `ray start` and all that it has started, and nothing else: nothing of it is to be kept."""
    own = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.kill()
    kill_all(own)
    process.wait()
    psutil.wait_procs(own, timeout=10)
