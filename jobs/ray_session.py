"""The Ray that a command runs on: the cluster that RAY_ADDRESS names, or an embedded one that is gone afterwards.

    with ray_session():
        ...  # ray.is_initialized()

The embedded Ray belongs to this process alone: loopback sockets, no dashboard, a temporary directory of its own.
Leaving the block, also by an exception, Ctrl-C or SIGTERM, ends its processes and removes its directory. A Ray that is
already initialised in this process is used as it is and left running, so sessions nest. Other Rays on the machine are
not touched.
"""

import contextlib
import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

import ray
from ray._private import ray_constants, services
from ray._raylet import Config  # type: ignore[attr-defined]
from ray.exceptions import AuthenticationError

# isort: split
import psutil  # type: ignore[import-untyped]  # bundled with Ray, which puts it on the path

from blt.errors import ConfigError
from jobs.cluster.address import is_loopback
from jobs.stage_metrics import exported_stages
from jobs.worker_lines import worker_lines
from pipelines.environment import environment_defaults
from pipelines.log_line import are_json, worker_runtime_env

logger = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 256 << 20

# Ray puts sockets some 65 characters below its directory, and a socket's path may have 107 (103 on macOS).
_LONGEST_TEMPORARY_ROOT = 24
_SECONDS_TO_START = 120.0
_SECONDS_TO_END = 10.0
_SECONDS_TO_ANSWER = 10.0

_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}
# Each report of a train worker waits for the controller's next poll: 1.7 s at Ray's default of 2 s, 0.1 s at 0.2 s.
_TRAIN = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}
# Nothing but this machine can reach an embedded Ray, so it needs no token file in the home directory.
_EMBEDDED = {"RAY_AUTH_MODE": "disabled", ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0"}


@contextlib.contextmanager
def ray_session(num_cpus: int | None = None, object_store_bytes: int = OBJECT_STORE_BYTES) -> Iterator[None]:
    """Ray for the length of the block. Both arguments size an embedded Ray; num_cpus None takes the CPUs Ray finds."""
    with _signals_kept():
        if ray.is_initialized():
            yield
        elif address := os.environ.get("RAY_ADDRESS"):
            with (
                environment_defaults(_QUIET | _TRAIN),
                _token_by_default(address),
                worker_lines() as take_printers_place,
                _connected(address),
            ):
                take_printers_place()
                yield
        else:
            with (
                environment_defaults(_QUIET | _TRAIN | _EMBEDDED),
                _loopback_only(),
                worker_lines() as take_printers_place,
                _embedded(num_cpus, object_store_bytes),
            ):
                take_printers_place()
                yield


@contextlib.contextmanager
def _token_by_default(address: str) -> Iterator[None]:
    """Off this machine a token is used unless RAY_AUTH_MODE says otherwise; Ray itself would go without one."""
    host = address.removeprefix("ray://").rpartition(":")[0]
    if "RAY_AUTH_MODE" in os.environ or not host or is_loopback(host):
        yield
        return
    try:
        with environment_defaults({"RAY_AUTH_MODE": "token"}):
            Config.initialize("")  # Ray reads the mode when it is first imported, and then here
            yield
    finally:
        Config.initialize("")


@contextlib.contextmanager
def _connected(address: str) -> Iterator[None]:
    try:
        _knock(address)
        ray.init(address=address, logging_level=logging.WARNING, runtime_env=worker_runtime_env())
    except OSError as error:  # ConnectionError of ray.init among them
        raise ConfigError(f'RAY_ADDRESS "{address}": no Ray answers there; unset it to use a local one') from error
    except AuthenticationError as error:
        raise ConfigError(
            f'RAY_ADDRESS "{address}": Ray does not accept the token, or there is none: set RAY_AUTH_TOKEN or '
            "RAY_AUTH_TOKEN_PATH to that of the cluster, or RAY_AUTH_MODE=disabled for one without, in a network of "
            "your own"
        ) from error
    _leave_on_sigterm()
    try:
        with exported_stages():
            yield
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Raises OSError if nothing listens at HOST:PORT; ray.init tries for minutes. Says nothing on other addresses."""
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if separator and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_SECONDS_TO_ANSWER).close()


@contextlib.contextmanager
def _embedded(num_cpus: int | None, object_store_bytes: int) -> Iterator[None]:
    started = time.monotonic()
    root = tempfile.gettempdir()
    directory = tempfile.mkdtemp(prefix="blt-", dir=root if len(root) <= _LONGEST_TEMPORARY_ROOT else "/tmp")
    try:
        with patient_start():
            ray.init(
                address="local",
                num_cpus=num_cpus,
                object_store_memory=object_store_bytes,
                include_dashboard=False,
                logging_level=logging.WARNING,
                runtime_env=worker_runtime_env(),
                # Workers say much that is of no use here; what goes wrong in them comes back as an exception. Those who
                # ask for JSON collect it, and can leave out what they do not want.
                log_to_driver=are_json(),
                _temp_dir=directory,
            )
        _leave_on_sigterm()
        cpus = ray.cluster_resources()["CPU"]
        logger.info("ray started seconds=%.1f cpus=%d", time.monotonic() - started, cpus)
        with exported_stages():
            yield
    finally:
        with _uninterrupted():
            _end(directory)


@contextlib.contextmanager
def patient_start() -> Iterator[None]:
    """A node of Ray's that is started in the block may take 120 s to come up. Ray waits for 30, which is too short for
    a machine that is busy with other work, and has no setting for it.
    """
    get_node: Callable[[str, str], object] = services.get_node

    def patient(gcs_address: str, node_id: str) -> object:
        deadline = time.monotonic() + _SECONDS_TO_START
        while True:
            try:
                return get_node(gcs_address, node_id)
            except RuntimeError:  # it is not there yet
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    services.get_node = patient
    try:
        yield
    finally:
        services.get_node = get_node


def _end(directory: str) -> None:
    """Ends the embedded Ray: asks first, then kills what of it is still there, then removes its directory."""
    own = _processes_of(directory)
    try:
        ray.shutdown()
    finally:
        _, alive = psutil.wait_procs(own, timeout=_SECONDS_TO_END)
        for process in alive:
            logger.warning("ray process did not end, killing it pid=%d", process.pid)
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=_SECONDS_TO_END)
        shutil.rmtree(directory, ignore_errors=True)


def _processes_of(directory: str) -> list[psutil.Process]:
    """The Ray processes that this process started with that directory, and all that those started."""
    own: list[psutil.Process] = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(directory in argument for argument in child.cmdline()):
                own += [child, *child.children(recursive=True)]
    return own


@contextlib.contextmanager
def _loopback_only() -> Iterator[None]:
    # Ray takes 127.0.0.1 as the node's address, and then binds nothing else, only in the single-machine mode that is
    # its default on macOS; `_node_ip_address="127.0.0.1"` is replaced by an outside address. Ray reads the variable
    # when it is first imported, which may have been earlier: hence the constant too.
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR].lower() in ("1", "true")
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Puts the handlers of Ctrl-C and SIGTERM back: Ray Train's fit() replaces the first, Ray the second, for good."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave_on_sigterm() -> None:
    """Makes SIGTERM a SystemExit with status 143. Ray's own handler aborts the process, and nothing is cleaned up."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, leave)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Holds Ctrl-C and SIGTERM off, so that a second one does not leave half of Ray behind."""
    with _signals_kept():
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        yield
