"""The recorder: what workers and cluster tell of a run in; metrics, timeline and checkpoint times on disk out.

One actor beside the driver, so that no worker's death loses what was told and one clock times everything. It writes to
the output directory, or, where that lies on S3, to a local one that is stored with every checkpoint and at the end.
"""

import functools
import tempfile
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, cast

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.log_line import add_fields
from pipelines.storage import Storage
from pipelines.train.account import Account, Ledger, account_of
from pipelines.train.metrics import (
    METRICS_NAME,
    TENSORBOARD_NAME,
    MetricsWriter,
    RayGauges,
    Record,
    StepRecord,
    window_figures,
)
from pipelines.train.timeline import (
    TIMELINE_NAME,
    AnyEntry,
    Cause,
    Event,
    Joined,
    Saved,
    Started,
    Step,
    TimelineWriter,
    read_timeline,
)

STORE_SECONDS = 30.0
"""On S3, records are stored with every checkpoint, and between two of them about this often."""

RecorderHandle: TypeAlias = Any
"""The actor: Ray's own types take its methods for functions that never return."""


@dataclass(frozen=True, kw_only=True)
class RecorderConfig:
    """What a recorder has to know of a run."""

    output: str
    run: str
    log_every: int
    checkpoint_every: int
    steps: int
    flops_per_byte: float
    """Of a training step."""


Method = TypeVar("Method", bound=Callable[..., None])


def _kept(method: Method) -> Method:
    """What goes wrong in the method is kept as the recorder's fault too: nobody waits for what is told."""

    @functools.wraps(method)
    def keep(self: "Recorder", *args: Any, **kwargs: Any) -> None:
        try:
            method(self, *args, **kwargs)
        except Exception as error:
            self._fault = self._fault or f"{method.__name__}: {' '.join(str(error).split()) or type(error).__name__}"
            raise

    return cast(Method, keep)


class Recorder:
    """Takes what is told; a step that several workers tell of counts once."""

    def __init__(self, config: RecorderConfig) -> None:
        add_fields(process="recorder", metrics_run=config.run)
        self._config, storage = config, Storage(config.output)
        self._upload = None if storage.is_local else storage
        self._temporary = None if storage.is_local else tempfile.TemporaryDirectory(prefix="blt-recorder-")
        self._directory = Path(self._temporary.name if self._temporary else storage.root_uri)
        self._directory.mkdir(parents=True, exist_ok=True)
        self._stored: dict[str, tuple[int, int]] = {}
        if self._upload is not None:
            self._fetch(self._upload)
        self._metrics = MetricsWriter(self._directory)
        self._timeline = TimelineWriter(self._directory)
        self._gauges = RayGauges(config.run)
        self._arrived: set[str] = set()
        self._joined: dict[str, float] = {}
        self._made = array("d")
        """When each step was made, from step 1 on; 0 for those before this recorder."""
        self._window: list[StepRecord] = []
        self._peak_flops: dict[str, float] = {}
        self._events: list[Event] = []
        self._failures = self._newest_step = 0
        self._failure: str | None = None
        self._fault: str | None = None
        self._stored_at = time.monotonic()
        self._ledger = Ledger()
        for entry in read_timeline(str(self._directory)):
            self._ledger.add(entry)

    @_kept
    def started(self) -> None:
        """The command begins, or begins again; not told when it is this recorder that is started again."""
        self._note(Started(at=time.time()))

    def group_begins(self) -> None:
        """A new group of workers is about to start."""
        self._arrived.clear()

    def arrived(self, worker: str) -> int:
        """How many workers of the group have arrived by now, this one among them; a replacement is one more."""
        self._arrived.add(worker)
        return len(self._arrived)

    @_kept
    def joined(self, worker: str, step: int, peak_flops: float) -> None:
        """A worker, by a name that no other has, stands ready at `step`; peak_flops: FLOP/s of its device."""
        self._joined[worker], self._peak_flops[worker] = time.time(), peak_flops
        self._note(Joined(at=time.time(), worker=worker, step=step))

    @_kept
    def step(self, worker: str, record: StepRecord) -> None:
        """An update was made; each worker that took part may tell of it."""
        if self._is_known(worker, record.step):
            return
        now = time.time()
        self._metrics.rewind(record.step - 1)
        self._made.extend([0.0] * (record.step - 1 - len(self._made)))
        self._made.append(now)
        if record.step > self._newest_step:
            self._newest_step, self._failures = record.step, 0
        self._write_step(now, record)
        self._window.append(record)
        borders = (self._config.log_every, self._config.checkpoint_every)
        if record.step == self._config.steps or any(record.step % every == 0 for every in borders):
            self._close_window()
            if time.monotonic() - self._stored_at > STORE_SECONDS:
                self._store()

    @_kept
    def evaluated(self, step: int, figures: Record) -> None:
        """A held-out evaluation after `step`; told once or by every worker."""
        if not any(record["step"] == step and figures.keys() <= record.keys() for record in self._metrics.records[-8:]):
            self._metrics.write(step, figures)
            self._gauges.show(figures)

    @_kept
    def saved(self, step: int, blocked_seconds: float, seconds: float) -> None:
        """The checkpoint of `step` is whole. Its records end there, so that those of a resumed run cover every step."""
        if self._window and self._window[-1].step == step:
            self._close_window()
        self._note(Saved(at=time.time(), step=step, blocked_seconds=blocked_seconds, seconds=seconds))
        figures = {"train/checkpoint_seconds": seconds, "train/checkpoint_blocked_seconds": blocked_seconds}
        self._metrics.write(step, figures)
        self._gauges.show(figures)
        self._store()

    @_kept
    def event(self, cause: Cause, detail: str = "") -> None:
        """Something happened that may cost time."""
        event = Event(at=time.time(), cause=cause, detail=detail)
        self._note(event)
        self._events.append(event)
        self._failures += cause in ("failure", "hang")
        self._gauges.show({"train/interruptions": self._ledger.num_interruptions})

    def failures(self) -> int:
        """Deaths and hangs that nobody announced, since a step was made for the first time."""
        return self._failures

    def fail(self, message: str) -> None:
        """A fault that another try would only repeat; the first one stays."""
        self._failure = self._failure or message

    def failure(self) -> str | None:
        return self._failure

    def records_since(self, seen: int) -> tuple[list[Record], int]:
        """Metric records after the first `seen`, and how many there are; after a rewind, those that are new."""
        records = self._metrics.records
        return records[min(seen, len(records)) :], len(records)

    def events_since(self, seen: int) -> tuple[list[Event], int]:
        """What happened after the first `seen` events that this recorder was told of, and how many there are."""
        return self._events[min(seen, len(self._events)) :], len(self._events)

    def num_records(self) -> int:
        return len(self._metrics.records)

    def account(self) -> Account:
        """Of the run so far, earlier starts of the command included."""
        return account_of(read_timeline(str(self._directory)))

    def close(self) -> str | None:
        """Put everything where it belongs; nothing may be told after that. What could not be recorded, if anything."""
        self._close_window()
        self._metrics.close()
        self._timeline.close()
        self._store()
        return self._fault

    def _is_known(self, worker: str, step: int) -> bool:
        """Whether another worker told of this update; an update made again by a worker that came later is a new one."""
        if step > len(self._made):
            return False
        if self._made[step - 1] >= self._joined.get(worker, 0.0):
            return True
        del self._made[step - 1 :]
        self._window = [record for record in self._window if record.step < step]
        return False

    def _note(self, entry: AnyEntry) -> None:
        """Into the timeline, and into the account."""
        self._timeline.write(entry)
        self._ledger.add(entry)

    def _write_step(self, now: float, record: StepRecord) -> None:
        self._note(
            Step(
                at=now,
                step=record.step,
                workers=record.workers,
                sequences=record.sequences,
                loss=record.nats / record.targets if record.targets else None,
                seconds=record.seconds,
                paused_seconds=record.paused_seconds,
                tries=record.tries,
            )
        )

    def _close_window(self) -> None:
        if not self._window:
            return
        workers = self._window[-1].workers
        peaks = list(self._peak_flops.values())[-workers:]
        figures = window_figures(self._window, self._config.flops_per_byte, sum(peaks) if all(peaks) else 0.0)
        figures["train/interruptions"] = self._ledger.num_interruptions
        self._metrics.write(self._window[-1].step, figures)
        self._gauges.show(figures)
        self._window = []

    def _fetch(self, storage: Storage) -> None:
        for path in [METRICS_NAME, *storage.list(TIMELINE_NAME)]:
            if storage.exists(path):
                target = self._directory / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(storage.read_bytes(path))

    def _store(self) -> None:
        """Store what is new on S3."""
        self._stored_at = time.monotonic()
        self._metrics.flush()
        if self._upload is None:
            return
        for name in (METRICS_NAME, TIMELINE_NAME, TENSORBOARD_NAME):
            root = self._directory / name
            for path in sorted(root.rglob("*")) if root.is_dir() else [root]:
                stat = path.stat()
                seen, relative = (stat.st_size, stat.st_mtime_ns), str(path.relative_to(self._directory))
                if path.is_file() and self._stored.get(relative) != seen:
                    self._upload.write_replace(relative, path.read_bytes())
                    self._stored[relative] = seen


def start_recorder(config: RecorderConfig) -> RecorderHandle:
    """The recorder of a run, on the node of the caller; it goes with the driver, and comes back if it dies."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(Recorder).options(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here)
    return actor.remote(config)
