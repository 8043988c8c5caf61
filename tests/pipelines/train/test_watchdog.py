"""The watchdog in a process of its own: it kills who stands still, and nobody else."""

import signal
import subprocess
import sys

STANDS_STILL = """
import threading
from pipelines.train.watchdog import Watchdog
still = threading.Event()
with Watchdog() as watchdog:
    still.wait(0.1)  # nothing is watched
    with watchdog.watches(2.0):
        for _ in range(8):
            watchdog.alive()
            still.wait(0.4)  # slow, but there is progress
    still.wait(2.5)  # not watched any more
    with watchdog.watches(60.0):
        print("alive", flush=True)
    with watchdog.watches(0.5):
        still.wait(60)
"""


def test_it_kills_who_stands_still_and_nobody_else() -> None:
    done = subprocess.run([sys.executable, "-c", STANDS_STILL], capture_output=True, text=True, timeout=50, check=False)
    assert done.stdout == "alive\n"
    assert done.returncode == -signal.SIGKILL
