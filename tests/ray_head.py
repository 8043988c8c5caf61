"""A Ray cluster of one node with a job server, as `ray start --head` makes it: on loopback, ended by its own pids."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import ray  # noqa: F401

# isort: split
import psutil  # bundled with Ray, which puts it on the path

# isort: split

from blt.errors import ClusterError
from jobs.cluster.access import asks_for_token
from jobs.cluster.address import parse_address

_SECONDS_TO_START = 90
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


@dataclass(frozen=True, kw_only=True)
class RayHead:
    """A running cluster."""

    address: str
    """http://127.0.0.1:PORT of its job server."""
    directory: Path
    """Its temporary directory, with the logs."""


@contextlib.contextmanager
def ray_head(environment: Mapping[str, str], num_cpus: int = 4) -> Iterator[RayHead]:
    """A cluster whose processes have these variables and no others of Ray or AWS; ended with the block."""
    bin_directory = str(Path(sys.executable).parent)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_", "PYTHONPATH"))}
    kept["PATH"] = os.pathsep.join([bin_directory, kept.get("PATH", "")])
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}
    directory = Path(tempfile.mkdtemp(prefix="blt-head-", dir="/tmp"))  # short: Ray puts sockets below it
    ports = dict(zip(_PORTS, _free_ports(len(_PORTS)), strict=True))
    command = [
        *(str(Path(bin_directory) / "ray"), "start", "--head", "--block", "--include-dashboard=true"),
        *("--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--num-cpus={num_cpus}", "--num-gpus=0"),
        *("--object-store-memory=150000000", "--min-worker-port=0", "--max-worker-port=0", f"--temp-dir={directory}"),
        *(f"--{name}={port}" for name, port in ports.items()),
    ]
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=kept | quiet | dict(environment))
    address = f"http://127.0.0.1:{ports['dashboard-port']}"
    try:
        _wait_until_ready(process, address, directory / "log")
        yield RayHead(address=address, directory=directory)
    finally:
        _end(process)
        shutil.rmtree(directory, ignore_errors=True)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


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
    for one in own:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()
    psutil.wait_procs(own, timeout=10)
