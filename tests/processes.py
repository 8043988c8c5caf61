"""Other processes that a test stops for a look at what they did, and kills."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterable
from pathlib import Path

import ray  # noqa: F401

# isort: split
import psutil  # bundled with Ray, which puts it on the path

# isort: split

from tests.waiting import wait_for

_SECONDS_TO_STOP = 60.0


def stops_when(pid: int, condition: Callable[[], bool]) -> bool:
    """Where it is so, stop the process and look again: if it still is, the process stays stopped, and what was seen
    stays so until it is killed or continued; if not, it goes on. ProcessLookupError if the process is gone.
    """
    if not condition():
        return False
    os.kill(pid, signal.SIGSTOP)
    wait_for(lambda: _stands_still(pid), f"process {pid} to stop", seconds=_SECONDS_TO_STOP)
    if condition():
        return True
    os.kill(pid, signal.SIGCONT)
    return False


def _stands_still(pid: int) -> bool:
    """Stopped with all its threads, for one that is in a system call ends it first; or dead."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # dead and gone
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that ended meanwhile
                state = Path(f"/proc/{pid}/task/{thread}/stat").read_text().rpartition(")")[2].split()[0]
                if state not in ("T", "Z"):
                    return False
    return True


def kill_all(processes: Iterable[psutil.Process]) -> None:
    """SIGKILL for those that are still there."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
