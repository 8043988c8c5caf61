"""What happened in a run, in order: entries in, lines of JSON in OUTPUT/timeline/ out. Nothing is ever taken back.

A step that was done again stands there twice, with the hash of its sequences each time, so that the file proves what
order the run saw and shows what every interruption cost (`pipelines.train.account`).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec

from blt.errors import DataError
from pipelines.storage import Storage

TIMELINE_NAME = "timeline"
ENTRIES_PER_FILE = 20_000
"""A run on S3 stores the newest file again and again, so files end."""

Cause = Literal["failure", "hang", "preemption", "growth", "shrink", "restart", "aborted", "skipped", "checkpoint"]
"""Of an event. failure: a worker or node died; hang: a worker stood still and was ended; preemption: the cluster
announced the loss of a node; growth, shrink: other numbers of workers; restart: the command was started again; aborted:
a step was given up and done again; skipped: an update was left out; checkpoint: one could not be written or read."""


class Entry(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind"):
    """One line; `at` is seconds since the epoch on the recorder's clock."""

    at: float


class Started(Entry, frozen=True, kw_only=True, tag="started"):
    """The command began, or began again."""


class Joined(Entry, frozen=True, kw_only=True, tag="joined"):
    """A worker stands ready at a step."""

    worker: str
    step: int


class Step(Entry, frozen=True, kw_only=True, tag="step"):
    """An update was made, by all workers together."""

    step: int
    """Updates done with it."""
    workers: int
    sequences: str
    """Hash of the ids of the global batch's sequences, as read by the workers; hexadecimal."""
    loss: float | None
    """Nats per target; None if the update was left out."""
    seconds: float
    """Of the try that succeeded."""
    paused_seconds: float = 0.0
    """Evaluation and checkpoint since the step before."""
    tries: int = 1


class Event(Entry, frozen=True, kw_only=True, tag="event"):
    """Something that may cost time."""

    cause: Cause
    detail: str = ""


class Saved(Entry, frozen=True, kw_only=True, tag="saved"):
    """A checkpoint is whole."""

    step: int
    blocked_seconds: float
    """Time that training stood still for it."""
    seconds: float
    """From its begin to its commit."""


AnyEntry: TypeAlias = Started | Joined | Step | Event | Saved

_DECODER: msgspec.json.Decoder[AnyEntry] = msgspec.json.Decoder(AnyEntry)


class TimelineWriter:
    """Appends entries below `directory`/timeline; goes on after those that are there."""

    def __init__(self, directory: Path) -> None:
        self._root = directory / TIMELINE_NAME
        self._root.mkdir(parents=True, exist_ok=True)
        for path in sorted(self._root.iterdir()):
            _drop_half_line(path)
        self._count = sum(path.read_bytes().count(b"\n") for path in self._root.iterdir())
        self._file = self._path().open("ab")

    def write(self, entry: Entry) -> None:
        """Append and flush one line."""
        self._file.write(msgspec.json.encode(entry) + b"\n")
        self._file.flush()
        self._count += 1
        if self._count % ENTRIES_PER_FILE == 0:
            self._file.close()
            self._file = self._path().open("ab")

    def close(self) -> None:
        self._file.close()

    def _path(self) -> Path:
        return self._root / f"{self._count // ENTRIES_PER_FILE:08d}.jsonl"


def read_timeline(output: str) -> Iterator[AnyEntry]:
    """All entries of a run, oldest first; a half-written last line is left out. DataError names a broken file."""
    storage = Storage(output)
    for path in storage.list(TIMELINE_NAME):
        text = storage.read_bytes(path)
        try:
            yield from (_DECODER.decode(line) for line in text[: text.rfind(b"\n") + 1].splitlines())
        except msgspec.DecodeError as error:
            raise DataError(f"{storage.url(path)}: is not a timeline ({error})") from error


def _drop_half_line(path: Path) -> None:
    text = path.read_bytes()
    if not text.endswith(b"\n"):
        path.write_bytes(text[: text.rfind(b"\n") + 1])
