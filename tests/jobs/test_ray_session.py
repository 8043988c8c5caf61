"""The embedded Ray: it answers, on loopback only, and nothing of it is left, however the block is left."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import stops_when
from tests.waiting import wait_for

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

# Ray is started in a process of its own, for it reads much of the environment once, when it is first imported.
PROGRAM = """
import json, os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background of a shell begins with it ignored
import ray
from jobs.ray_session import ray_session
import psutil

with ray_session(num_cpus=2):
    with ray_session():
        pid, address = ray.get(ray.remote(lambda: (os.getpid(), ray.util.get_node_ip_address())).remote())
    own = psutil.Process().children(recursive=True)
    listening = {c.laddr.ip for p in own for c in p.net_connections() if c.status == "LISTEN"}
    directory = ray._private.worker.global_worker.node.get_temp_dir_path()
    print(json.dumps([[p.pid for p in own], pid, address, sorted(listening), directory]), flush=True)
    if sys.argv[1] == "error":
        raise RuntimeError("the work failed")
    if sys.argv[1] == "wait":
        time.sleep(60)
print("ended", ray.is_initialized(), [name for name in os.environ if name == "RAY_AUTH_MODE"])
"""


def start(mode: str, directory: Path) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, mode],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=directory,
        env=environment,
        start_new_session=True,
    )


def stops_cleaning_up(pid: int, number: signal.Signals) -> bool:
    """Whether it stops while it holds the signal off."""

    def is_held_off() -> bool:
        status = Path(f"/proc/{pid}/status").read_text()
        return bool(int(status.partition("SigIgn:")[2].split()[0], 16) >> (number - 1) & 1)

    return stops_when(pid, is_held_off)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize(
    ("mode", "number", "status"),
    [
        ("end", None, 0),
        ("wait", signal.SIGINT, -signal.SIGINT),
        pytest.param("error", None, 1, marks=pytest.mark.slow),
        pytest.param("wait", signal.SIGTERM, 143, marks=pytest.mark.slow),
    ],
)
def test_nothing_is_left_of_an_embedded_ray(
    mode: str, number: signal.Signals | None, status: int, tmp_path: Path
) -> None:
    process = start(mode, tmp_path)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.communicate()[1]
    pids, worker, address, listening, directory = json.loads(line)
    if number is not None:
        os.killpg(process.pid, number)  # as a terminal does: to Ray's processes too
        wait_for(lambda: process.poll() is not None or stops_cleaning_up(process.pid, number), "clean-up", seconds=60)
        if process.returncode is None:
            os.killpg(process.pid, number)
            os.kill(process.pid, signal.SIGCONT)
    out, log = process.communicate(timeout=60)
    assert process.returncode == status, log
    assert worker in pids
    assert address == "127.0.0.1"
    assert {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}
    assert [pid for pid in pids if is_running(pid)] == []
    assert not Path(directory).exists()
    if mode == "end":
        assert out == "ended False []\n"


def test_unreachable_cluster_is_named(tmp_path: Path) -> None:
    program = "from jobs.ray_session import ray_session\nwith ray_session(): pass"
    environment = os.environ | {"RAY_ADDRESS": "127.0.0.1:1", "PYTHONPATH": str(Path(__file__).parents[2])}
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=60
    )
    assert 'ConfigError: RAY_ADDRESS "127.0.0.1:1": no Ray answers there' in run.stderr


@pytest.mark.parametrize("mode", [None, "token"])
def test_off_this_machine_a_token_is_needed(mode: str | None, tmp_path: Path) -> None:
    """0.0.0.0 leads here and is no loopback address; without a token nothing is sent there."""
    program = """
import os, socket
from jobs.ray_session import ray_session

with socket.create_server(("0.0.0.0", 0)) as server:
    os.environ["RAY_ADDRESS"] = f"0.0.0.0:{server.getsockname()[1]}"
    before = os.environ.get("RAY_AUTH_MODE")
    try:
        with ray_session(): pass
    except ValueError as error:
        print(error)
    assert os.environ.get("RAY_AUTH_MODE") == before
    while True:
        server.settimeout(0.1)
        try: connection, _ = server.accept()
        except TimeoutError: break
        print("received", connection.recv(1000))
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2]), "HOME": str(tmp_path)}
    environment |= {"RAY_AUTH_MODE": mode} if mode else {}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=60)
    told, *received = run.stdout.splitlines()
    assert "set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH" in told, run.stderr
    assert set(received) == {"received b''"}, "only the question whether anything listens"
