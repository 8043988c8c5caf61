"""How far a long piece of work is: a bar on a terminal, a log line now and then elsewhere.

    with progress("patching", total=num_bytes, unit="bytes") as bar:
        bar.advance(4096)
        bar.update(mean_patch_bytes=4.5)

Standard error is the only output, so that the last line of standard output stays the result.
"""

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Iterator
from typing import Protocol

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from jobs.stage_metrics import Advance, begin_stage
from pipelines.log_line import are_json

logger = logging.getLogger(__name__)

LOG_EVERY_SECONDS = 10.0


class ProgressReport(Protocol):
    """What work reports to. Both calls may come from any thread."""

    def advance(self, count: int = 1) -> None:
        """Adds `count` units to what is done."""

    def update(self, **figures: float | str) -> None:
        """Sets figures to show beside the count."""


@contextlib.contextmanager
def progress(description: str, total: int | None = None, unit: str = "items") -> Iterator[ProgressReport]:
    """Shows the progress of the block. `total` is in `unit`s, None if unknown; bytes are shown as kB, MB and so on."""
    tell = begin_stage(description, unit, total)
    if sys.stderr.isatty() and not are_json():
        with _bar(description, total, unit) as bar:
            yield _Told(bar, tell)
        return
    log = _Log(description, total, unit)
    try:
        yield _Told(log, tell)
    except BaseException:
        log.say("stopped")
        raise
    log.say("done")


class _Told:
    """What is shown, and told to the metrics."""

    def __init__(self, shown: ProgressReport, tell: Advance) -> None:
        self._shown, self._tell = shown, tell

    def advance(self, count: int = 1) -> None:
        self._shown.advance(count)
        self._tell(count)

    def update(self, **figures: float | str) -> None:
        self._shown.update(**figures)


@contextlib.contextmanager
def _bar(description: str, total: int | None, unit: str) -> Iterator["_Bar"]:
    # The bar redirects sys.stderr, through which log lines go, so that these appear above it.
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TextColumn("{task.fields[facts]}", style="dim"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), redirect_stdout=False) as display:
        task = display.add_task(description, total=total, facts="")
        yield _Bar(display, task, unit)


class _Bar:
    """A rich bar with the count, the rate and the figures behind it."""

    def __init__(self, display: Progress, task: TaskID, unit: str) -> None:
        self._display, self._task, self._unit = display, task, unit
        self._figures: dict[str, float | str] = {}

    def advance(self, count: int = 1) -> None:
        self._display.advance(self._task, count)
        self._show()

    def update(self, **figures: float | str) -> None:
        self._figures |= figures
        self._show()

    def _show(self) -> None:
        task = self._display.tasks[self._display.task_ids.index(self._task)]
        facts = _facts(int(task.completed), None if task.total is None else int(task.total), self._unit, task.elapsed)
        self._display.update(self._task, facts=" ".join((facts, *_shown(self._figures))))


class _Log:
    """A log line at most every LOG_EVERY_SECONDS, and one at the end."""

    def __init__(self, description: str, total: int | None, unit: str) -> None:
        self._description, self._total, self._unit = description, total, unit
        self._done, self._figures = 0, dict[str, float | str]()
        self._lock = threading.Lock()
        self._started = self._said = time.monotonic()

    def advance(self, count: int = 1) -> None:
        with self._lock:
            self._done += count
        self._say_if_due()

    def update(self, **figures: float | str) -> None:
        with self._lock:
            self._figures |= figures
        self._say_if_due()

    def _say_if_due(self) -> None:
        with self._lock:
            now = time.monotonic()
            if now - self._said < LOG_EVERY_SECONDS:
                return
            self._said = now
        self.say("running")

    def say(self, state: str) -> None:
        elapsed = time.monotonic() - self._started
        facts = _facts(self._done, self._total, self._unit, elapsed)
        line = " ".join((facts, f"seconds={elapsed:.1f}", *_shown(self._figures)))
        logger.info("%s %s %s", self._description, state, line)


def _facts(done: int, total: int | None, unit: str, elapsed: float | None) -> str:
    """The count out of the total, and the rate: "1.2 MB/3.4 MB 310 kB/s"."""
    rate = done / elapsed if elapsed else 0.0
    counts = [_amount(done, unit)] + ([] if total is None else [_amount(total, unit)])
    if unit == "bytes":
        return f"{'/'.join(counts)} {decimal(int(rate))}/s"
    return f"{'/'.join(counts)} {unit} {rate:.1f}/s"


def _amount(count: int, unit: str) -> str:
    return decimal(count) if unit == "bytes" else str(count)


def _shown(figures: dict[str, float | str]) -> list[str]:
    return [f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in figures.items()]
