"""The records of finished shards: created exclusively, one for each, and gathered into parts as a run goes on.

`_commits/ID.json` says that the data file of a shard stands whole; `_commits/part-HASH.jsonl` holds a thousand such
records, so that one listing and a few reads tell what a dataset of 100,000 shards holds. A shard is done when its
record and its file, of the recorded size, exist. Records may be there twice; they never disagree.
"""

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

import msgspec

from blt.errors import ConfigError, DataError
from pipelines.manifest import MANIFEST_PATH
from pipelines.patch.plan import PatchPlan, differences
from pipelines.patch.stages import StageSeconds
from pipelines.storage import Storage

COMMITS = "_commits"
PLAN_PATH = "_plan.json"
COMMITS_PER_PART = 1000
_PART_PREFIX = f"{COMMITS}/part-"
_CONNECTIONS = 16
"""Threads that read or delete records: on object storage each is a round trip."""
_LISTINGS = 20
"""Listings to make while another driver gathers the records that were just listed."""


class Commit(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The record of one finished shard; that of the same work agrees with it. As many as shards, so not tracked by the
    garbage collector.
    """

    id: str
    path: str
    source: str
    documents: int
    bytes: int
    """Bytes of document text."""
    patches: int
    size_bytes: int
    """Of the data file."""
    sha256: str
    """Of the data file."""
    plan: str
    """Hash of the plan that it was made under."""
    seconds: StageSeconds = StageSeconds()

    def agrees_with(self, other: Self) -> bool:
        """Whether both tell of the same file made in the same way; seconds may differ."""
        return msgspec.structs.replace(self, seconds=other.seconds) == other


_DECODER = msgspec.json.Decoder(Commit)


@dataclass(frozen=True, kw_only=True)
class Done:
    """What stands of a dataset."""

    commits: dict[str, Commit]
    """By unit id: shards whose record and data file are there."""
    ungathered: tuple[Commit, ...]
    """Records that are in no part yet."""
    has_manifest: bool


def claim(storage: Storage, plan: PatchPlan) -> None:
    """Write the plan into the dataset, or find the same one there; ConfigError naming what differs from another.

    Another plan never gives way, not even where nothing of it shows yet: its driver may be starting its actors.
    """
    if not storage.write_exclusive(PLAN_PATH, plan.to_json()):
        is_claimed(storage, plan)


def is_claimed(storage: Storage, plan: PatchPlan) -> bool:
    """Whether the dataset was begun, under this plan; ConfigError if under another, naming what differs."""
    try:
        stored_hash, settings = read_plan(storage)
    except FileNotFoundError:
        return False
    if stored_hash == plan.hash:
        return True
    raise ConfigError(
        f"{storage.root_uri} was begun under another configuration: "
        f"{'; '.join(differences(settings, plan.settings))}; choose another output or remove the directory"
    )


def read_plan(storage: Storage) -> tuple[str, dict[str, object]]:
    """Hash and settings of the plan that a dataset is made under; FileNotFoundError if it was not begun."""
    try:
        stored = json.loads(storage.read_bytes(PLAN_PATH))
        return str(stored["hash"]), dict(stored["settings"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{storage.url(PLAN_PATH)} is broken; remove the directory or choose another output") from error


def read_commits(storage: Storage, plan_hash: str) -> Done:
    """What is done under the plan, from one listing of the dataset; DataError for records of another plan."""
    for _ in range(_LISTINGS):
        sizes = storage.sizes()
        parts = [path for path in sorted(sizes) if path.startswith(_PART_PREFIX)]
        singles = [
            path for path in sorted(sizes) if path.startswith(f"{COMMITS}/") and not path.startswith(_PART_PREFIX)
        ]
        try:
            gathered, ungathered = _read_all(storage, parts), _read_all(storage, singles)
        except FileNotFoundError:
            continue  # another driver has gathered it since the listing
        commits = _unique(storage, plan_hash, [*gathered, *ungathered])
        there = {id: commit for id, commit in commits.items() if sizes.get(commit.path) == commit.size_bytes}
        return Done(commits=there, ungathered=tuple(ungathered), has_manifest=MANIFEST_PATH in sizes)
    raise DataError(f"{storage.url(COMMITS)} changed during each of {_LISTINGS} listings; try again")


def _read_all(storage: Storage, paths: Iterable[str]) -> list[Commit]:
    with ThreadPoolExecutor(_CONNECTIONS) as connections:
        return [commit for commits in connections.map(lambda path: _read(storage, path), paths) for commit in commits]


def _read(storage: Storage, path: str) -> list[Commit]:
    """The records of one file; DataError if it is broken."""
    data = storage.read_bytes(path)
    try:
        return _DECODER.decode_lines(data)
    except ValueError as error:
        raise DataError(
            f"commit {storage.url(path)} is broken: {error}; remove it to have its shards verified"
        ) from error


def _unique(storage: Storage, plan_hash: str, found: Iterable[Commit]) -> dict[str, Commit]:
    """The records by id; DataError for one of another plan, or two of a shard that differ."""
    commits: dict[str, Commit] = {}
    for commit in found:
        if commit.plan != plan_hash:
            raise DataError(
                f"commit {commit.id} in {storage.url(COMMITS)} belongs to another plan; "
                "choose another output or remove the directory"
            )
        if not commits.setdefault(commit.id, commit).agrees_with(commit):
            raise DataError(
                f"two commits of {commit.id} in {storage.url(COMMITS)} differ; "
                f"remove them and {storage.url(commit.path)} to have it made again"
            )
    return commits


def record(storage: Storage, commit: Commit) -> None:
    """Write the record of a shard, or find an equal one there; DataError if the one there says something else."""
    path = _path(commit)
    if storage.write_exclusive(path, msgspec.json.encode(commit) + b"\n"):
        return
    try:
        there = _read(storage, path)
    except FileNotFoundError:  # gathered into a part this moment
        return
    if [one.agrees_with(commit) for one in there] != [True]:
        raise DataError(
            f"commit {storage.url(path)} does not describe {storage.url(commit.path)}; "
            "remove both to have it made again"
        )


def gather(storage: Storage, commits: Iterable[Commit]) -> None:
    """Put records into one part and remove their own files. Killed in between, or done by two drivers at once, it
    leaves some records twice.
    """
    commits = sorted(commits, key=lambda commit: commit.id)
    if not commits:
        return
    data = b"".join(msgspec.json.encode(commit) + b"\n" for commit in commits)
    storage.write_exclusive(f"{_PART_PREFIX}{hashlib.sha256(data).hexdigest()[:16]}.jsonl", data)
    with ThreadPoolExecutor(_CONNECTIONS) as connections:
        list(connections.map(lambda commit: storage.delete(_path(commit)), commits))


def _path(commit: Commit) -> str:
    return f"{COMMITS}/{commit.id}.json"
