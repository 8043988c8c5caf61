"""The watchdog of a worker: kills its own process when that makes no progress.

What waits for other workers has timeouts of its own and is not watched: whoever stands still is ended, not those who
wait for it.
"""

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator

logger = logging.getLogger(__name__)


class Watchdog:
    """A thread that looks on; a context manager that begins and ends it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._seconds = 0.0
        self._deadline: float | None = None
        """On the monotonic clock; None: nothing is watched."""
        self._has_ended = False
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        with self._changed:
            self._has_ended = True
            self._changed.notify_all()
        self._thread.join()

    @contextlib.contextmanager
    def watches(self, seconds: float) -> Iterator[None]:
        """SIGKILL to this process if the block lasts longer than `seconds` without a call of `alive`."""
        with self._changed:
            self._seconds, self._deadline = seconds, time.monotonic() + seconds
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._deadline = None

    def alive(self) -> None:
        """There was progress."""
        with self._changed:
            if self._deadline is not None:
                self._deadline = time.monotonic() + self._seconds

    def _watch(self) -> None:
        with self._changed:
            while not self._has_ended:
                left = None if self._deadline is None else self._deadline - time.monotonic()
                if left is not None and left <= 0:
                    logger.error("no progress for %.0f s: this worker ends itself", self._seconds)
                    os.kill(os.getpid(), signal.SIGKILL)
                self._changed.wait(left)
