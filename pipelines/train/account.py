"""The account of a run: its timeline in; steps redone, seconds lost for each interruption, and goodput out. Pure.

An interruption begins after the last step that stood and ends with the first step that was new again; what it cost is
the time between, less that step's own. So a restart, the steps done again after it, tries that were given up and the
wait for a worker that the others then went on without all count as lost; evaluation and checkpoints do not.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from pipelines.train.timeline import AnyEntry, Cause, Event, Saved, Started, Step

_RANK: tuple[Cause, ...] = (
    *("failure", "hang", "preemption", "growth", "shrink"),
    *("restart", "aborted", "skipped", "checkpoint"),
)
"""Of several events before the next new step, the first of these is the cause."""
_LATE_SECONDS = 60.0
"""The cluster may tell why a worker was lost only after the others went on."""


@dataclass(frozen=True, kw_only=True)
class Interruption:
    """One event and its cost."""

    cause: Cause
    detail: str
    step: int
    """Updates done when it came."""
    steps_redone: int
    """Updates that were made again: lost committed steps."""
    tries_lost: int
    """Tries of a step that were given up before their update."""
    seconds_lost: float


@dataclass(frozen=True, kw_only=True)
class Account:
    """What a run did and what it lost."""

    steps: int
    steps_redone: int
    tries_lost: int
    seconds: float
    """From the begin of the first step to the end of the last."""
    seconds_lost: float
    startup_seconds: float
    """From the command to the first step."""
    checkpoints: int
    checkpoint_blocked_seconds: float
    interruptions: tuple[Interruption, ...]

    @property
    def goodput(self) -> float:
        """Share of the time that went into steps that stood."""
        return 1.0 - self.seconds_lost / self.seconds if self.seconds > 0 else 1.0

    @property
    def steps_kept(self) -> float:
        """Updates that stood over all tries."""
        attempted = self.steps + self.steps_redone + self.tries_lost
        return self.steps / attempted if attempted else 1.0


def account_of(entries: Iterable[AnyEntry]) -> Account:
    """The account of a timeline, oldest entry first."""
    ledger = Ledger()
    for entry in entries:
        ledger.add(entry)
    return ledger.close()


@dataclass
class Ledger:
    """The walk through a timeline, entry by entry."""

    high: int = 0
    """Newest step that was made for the first time."""
    workers: int = 0
    """That made it."""
    begun: float | None = None
    started: float | None = None
    last: float = 0.0
    """End of step `high`, or of what followed it."""
    redone: int = 0
    """Since step `high`."""
    newest: Step | None = None
    """The step done again last."""
    causes: list[Event] = field(default_factory=list)
    """Since step `high`."""
    interruptions: list[Interruption] = field(default_factory=list)
    blocked: float = 0.0
    checkpoints: int = 0
    ended: float = 0.0

    @property
    def num_interruptions(self) -> int:
        """Those that are over, and the one that lasts."""
        lasts = self.begun is not None and bool(self.causes or self.redone)
        return len(self.interruptions) + lasts

    def add(self, entry: AnyEntry) -> None:
        """Take the next entry into account."""
        if isinstance(entry, Started):
            if self.begun is not None:
                self.causes.append(Event(at=entry.at, cause="restart", detail="the command was started again"))
            elif self.started is None:
                self.started = entry.at
        elif isinstance(entry, Event):
            self._event(entry)
        elif isinstance(entry, Saved):
            self.checkpoints += 1
            self.blocked += entry.blocked_seconds
        elif isinstance(entry, Step):
            self._step(entry)

    def _event(self, event: Event) -> None:
        """An event belongs to the next interruption, or to the one just over if that has no cause yet."""
        last = self.interruptions[-1] if self.interruptions else None
        if last is not None and last.cause == "aborted" and not self.causes and event.at - self.ended < _LATE_SECONDS:
            self.interruptions[-1] = replace(last, cause=event.cause, detail=event.detail)
        else:
            self.causes.append(event)

    def _step(self, step: Step) -> None:
        if self.begun is None:
            self.begun = step.at - step.seconds
        elif step.step <= self.high:
            self.redone, self.newest = self.redone + 1, step
            return
        elif self.causes or self.redone or step.tries > 1 or step.workers < self.workers:
            self._interrupted(step)
        self.high, self.last, self.redone, self.workers = max(self.high, step.step), step.at, 0, step.workers
        self.causes.clear()

    def _interrupted(self, step: Step) -> None:
        """Close the interruption that `step`, the first new one, ends."""
        self._close_interruption(step, max(step.at - self.last - step.seconds - step.paused_seconds, 0.0))

    def _close_interruption(self, step: Step, lost: float) -> None:
        told = min(self.causes, key=lambda event: _RANK.index(event.cause), default=None)
        cause: Cause = "aborted" if told is None else told.cause
        self.ended = step.at
        self.interruptions.append(
            Interruption(
                cause=cause,
                detail="" if told is None else told.detail,
                step=self.high,
                steps_redone=self.redone,
                tries_lost=step.tries - 1,
                seconds_lost=round(lost, 3),
            )
        )

    def close(self) -> Account:
        """The account; nothing may be added after that."""
        if self.redone and self.newest is not None:  # the last step itself was done again: no new one ended it
            self._close_interruption(self.newest, self.newest.at - self.last)
            self.last = self.newest.at
        begun = self.begun or 0.0
        return Account(
            steps=self.high,
            steps_redone=sum(one.steps_redone for one in self.interruptions),
            tries_lost=sum(one.tries_lost for one in self.interruptions),
            seconds=round(self.last - begun, 3) if self.begun is not None else 0.0,
            seconds_lost=round(sum(one.seconds_lost for one in self.interruptions), 3),
            startup_seconds=round(begun - self.started, 3)
            if self.begun is not None and self.started is not None
            else 0.0,
            checkpoints=self.checkpoints,
            checkpoint_blocked_seconds=round(self.blocked, 3),
            interruptions=tuple(self.interruptions),
        )
