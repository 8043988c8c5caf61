"""What a run left on disk, read once, so that the page and the terminal's table show the same facts.

In: a directory for each part of a run. Out: a `Run`. Every part may be missing; a part that is there but broken is a
DataError that names the file.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, TypeVar

import msgspec

from blt.errors import DataError
from jobs.record import RECORD_NAME, JobRecord, read_record
from jobs.sample import SAMPLE_NAME, Sample
from pipelines.evaluate.evaluation import EVALUATION_PATH, Evaluation
from pipelines.manifest import MANIFEST_PATH, Manifest, read_manifest
from pipelines.patch.calibration import CALIBRATION_PATH, Calibration, read_calibration
from pipelines.patch.stats import STATS_PATH
from pipelines.storage import Storage
from pipelines.train.account import Account, account_of
from pipelines.train.metrics import METRICS_NAME, read_metrics
from pipelines.train.timeline import TIMELINE_NAME, AnyEntry, Step, read_timeline

MODEL_CONFIG_PATH = "model/config.json"

COMMANDS: Mapping[str, str] = MappingProxyType(
    {
        "documents": "shard",
        "entropy_model": "train-entropy",
        "calibration": "calibrate",
        "patches": "patch",
        "model": "train",
        "evaluation": "eval",
        "sample": "generate",
    }
)
"""The parts of a run, each the directory of that name below it, and the command that makes each; in order."""

_CONTENT: Mapping[str, tuple[str, ...]] = {
    "documents": (MANIFEST_PATH,),
    "entropy_model": (METRICS_NAME, MODEL_CONFIG_PATH),
    "calibration": (CALIBRATION_PATH,),
    "patches": (MANIFEST_PATH,),
    "model": (METRICS_NAME, MODEL_CONFIG_PATH),
    "evaluation": (EVALUATION_PATH,),
    "sample": (SAMPLE_NAME,),
}
"""What a report reads of each part, its record apart; a part is there if it has one of these files."""

TRAININGS = ("entropy_model", "model")
"""The parts that are trainings."""

Content = TypeVar("Content")


@dataclass(frozen=True, kw_only=True)
class PatchStats:
    """The content of stats.json, as far as a report shows it."""

    total: dict[str, float]
    """Figures of all shards by name, actor_bytes_per_second among them."""


class Update(NamedTuple):
    """One update of a training, as it was made last."""

    step: int
    workers: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class History:
    """What a training's timeline tells."""

    account: Account
    updates: tuple[Update, ...]
    """By step."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run, or those parts of one that are there."""

    directories: Mapping[str, str]
    """Of each part that is there, by its name in COMMANDS."""
    missing: Mapping[str, str]
    """Where each of the others was looked for."""
    fingerprint: str
    """Hex sha256 over every file that was read but shards: manifests, records, metrics, timelines and figures."""
    records: Mapping[str, JobRecord]
    """job.json of each part that has one: a part without is not finished."""
    documents: Manifest | None
    patches: Manifest | None
    calibration: Calibration | None
    evaluation: Evaluation | None
    patch_stats: PatchStats | None
    sample: Sample | None
    metrics: Mapping[str, tuple[Mapping[str, float], ...]]
    """Records of metrics.jsonl of entropy_model and model, oldest first; empty where there are none."""
    histories: Mapping[str, History]
    """Of those trainings that have a timeline with an update in it."""


def run_directories(run: str) -> dict[str, str]:
    """Where each part of the run is looked for."""
    return {name: f"{run.rstrip('/')}/{name}" for name in COMMANDS}


def read_run(directories: Mapping[str, str]) -> Run:
    """Read what is there of the parts; DataError, naming the file, for what is broken. Unknown keys are passed over."""
    present = {name: root for name, root in directories.items() if any(map(Storage(root).exists, _CONTENT[name]))}
    return Run(
        directories=present,
        missing={name: root for name, root in directories.items() if name not in present},
        fingerprint=_fingerprint(present),
        records={name: record for name, root in present.items() if (record := read_record(root)) is not None},
        documents=_dataset(present, "documents"),
        patches=_dataset(present, "patches"),
        calibration=read_calibration(present["calibration"]) if "calibration" in present else None,
        evaluation=_read(present, "evaluation", EVALUATION_PATH, Evaluation),
        patch_stats=_read(present, "patches", STATS_PATH, PatchStats),
        sample=_read(present, "sample", SAMPLE_NAME, Sample),
        metrics={name: _metrics(present[name]) for name in TRAININGS if name in present},
        histories={
            name: history
            for name in TRAININGS
            if name in present and (history := read_history(present[name])) is not None
        },
    )


def _dataset(present: Mapping[str, str], kind: str) -> Manifest | None:
    if kind not in present:
        return None
    manifest = read_manifest(present[kind])
    if manifest.kind != kind:
        raise DataError(f"{present[kind]} is a dataset of {manifest.kind}, expected one of {kind}")
    return manifest


def _read(present: Mapping[str, str], part: str, path: str, kind: type[Content]) -> Content | None:
    """The JSON file `path` of a part; keys that `kind` does not have are passed over."""
    if part not in present:
        return None
    storage = Storage(present[part])
    if not storage.exists(path):
        return None
    try:
        return msgspec.json.decode(storage.read_bytes(path), type=kind)
    except (ValueError, OSError) as error:
        raise DataError(f"cannot read {storage.url(path)}: {error}") from error


def _metrics(root: str) -> tuple[Mapping[str, float], ...]:
    try:
        return tuple(read_metrics(root))
    except ValueError as error:
        raise DataError(f"cannot read {Path(root) / METRICS_NAME}: {error}") from error


def read_history(root: str) -> History | None:
    """What the timeline of a training tells; None if it tells of no update. DataError names a broken file."""
    updates: dict[int, Update] = {}

    def noted() -> Iterator[AnyEntry]:
        for entry in read_timeline(root):
            if isinstance(entry, Step):
                updates[entry.step] = Update(entry.step, entry.workers, entry.seconds)
            yield entry

    account = account_of(noted())
    return History(account=account, updates=tuple(update for _, update in sorted(updates.items()))) if updates else None


def _fingerprint(present: Mapping[str, str]) -> str:
    digest = hashlib.sha256()
    for name, root in sorted(present.items()):
        storage = Storage(root)
        timeline = storage.list(TIMELINE_NAME) if name in TRAININGS else []
        for path in (RECORD_NAME, STATS_PATH, *_CONTENT[name], *timeline):
            data = storage.read_bytes(path) if storage.exists(path) else b""
            digest.update(f"{name}/{path}:{len(data)}:".encode() + data)
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class StageFigures:
    """What one command took."""

    command: str
    seconds: float
    """All of it, starts included."""
    bytes: int | None
    """Bytes it worked on: of documents, or of training targets."""
    working_bytes_per_second: float | None
    """Of the work proper, as the stage itself measured it: of training steps, or of one actor; None if it did not."""

    @property
    def bytes_per_second(self) -> float | None:
        return self.bytes / self.seconds if self.bytes and self.seconds else None


def stages(run: Run) -> tuple[StageFigures, ...]:
    """The finished commands of a run, in order."""
    return tuple(_stage(run, name) for name in COMMANDS if name in run.records)


def _stage(run: Run, name: str) -> StageFigures:
    result = run.records[name].result
    working = result.figures.get("bytes_per_second")
    if name == "patches" and run.patch_stats is not None:
        working = run.patch_stats.total.get("actor_bytes_per_second")
    return StageFigures(
        command=COMMANDS[name],
        seconds=result.seconds,
        bytes=result.bytes,
        working_bytes_per_second=working if isinstance(working, int | float) else None,
    )
