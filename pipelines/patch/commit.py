"""Committing a shard exactly once: the data file is created exclusively, then the record that says so.

In: an encoded shard. Out: `SPLIT/shard-00000.parquet` and `_commits/SPLIT-00000.json`. Work may be done twice (a killed
actor, two drivers by mistake), data never: whoever finds the file there verifies it and adopts it. A shard counts as
done when its record and its file exist.
"""

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import msgspec
import pyarrow as pa

from blt.errors import DataError
from pipelines.manifest import SPLITS
from pipelines.patch.plan import PatchPlan, PatchUnit, differences
from pipelines.patch.shard_file import ContentHash, open_shard, read_row_group
from pipelines.schema import PATCH_SCHEMA
from pipelines.storage import Storage

COMMITS = "_commits"
PLAN_PATH = "_plan.json"
_READERS = 16
"""Threads that read commit records: on object storage each read is a round trip."""


@dataclass(frozen=True, kw_only=True)
class Commit:
    """The record of one finished shard. It holds nothing of time or place: done again, it is the same."""

    id: str
    path: str
    documents: int
    bytes: int
    """Bytes of document text."""
    patches: int
    sha256: str
    """Of the data file."""
    plan: str
    """Hash of the plan that it was made under."""


def claim(storage: Storage, plan: PatchPlan) -> None:
    """Write the plan into the dataset, or find the same one there; DataError naming what differs from another.

    Another plan that nothing was done for (its run failed at once) gives way.
    """
    if storage.write_exclusive(PLAN_PATH, plan.to_json()):
        return
    try:
        stored = json.loads(storage.read_bytes(PLAN_PATH))
        stored_hash, settings = str(stored["hash"]), dict(stored["settings"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{storage.url(PLAN_PATH)} is broken; remove the directory or choose another output") from error
    if stored_hash == plan.hash:
        return
    if any(storage.list(directory) for directory in (COMMITS, *SPLITS)):
        raise DataError(
            f"{storage.root_uri} was begun under another plan: {'; '.join(differences(settings, plan.settings))}; "
            "choose another output or remove the directory"
        )
    storage.write_replace(PLAN_PATH, plan.to_json())


def read_commits(storage: Storage, plan: PatchPlan) -> dict[str, Commit]:
    """Commits of finished shards by unit id: those of `plan` whose data file is there; DataError for foreign ones."""
    paths = storage.list(COMMITS)
    files = {path for split in sorted({unit.split for unit in plan.units}) for path in storage.list(split)}
    with ThreadPoolExecutor(_READERS) as pool:
        commits = list(pool.map(lambda path: _read_commit(storage, path, plan), paths))
    return {commit.id: commit for commit in commits if commit.path in files}


def _read_commit(storage: Storage, path: str, plan: PatchPlan) -> Commit:
    try:
        commit = msgspec.json.decode(storage.read_bytes(path), type=Commit)
    except (ValueError, OSError) as error:
        raise DataError(
            f"commit {storage.url(path)} is broken: {error}; remove it to have its shard verified"
        ) from error
    if commit.plan != plan.hash:
        raise DataError(
            f"commit {storage.url(path)} belongs to another plan; choose another output or remove the directory"
        )
    return commit


def footer(plan: PatchPlan, unit: PatchUnit, patches: int, content_sha256: str) -> dict[str, str]:
    """Key/values of a data file's footer: what made it and what it holds."""
    patching = plan.patching
    return {
        "plan": plan.hash,
        "documents_fingerprint": plan.documents,
        "entropy_model": patching.entropy_model or "",
        "rule": msgspec.json.encode(patching.rule).decode(),
        "reset_on_newline": json.dumps(patching.reset_on_newline),
        "dtype": patching.dtype,
        "device": patching.device,
        "source_shard": unit.path,
        "documents": str(unit.documents),
        "bytes": str(unit.bytes),
        "patches": str(patches),
        "content_sha256": content_sha256,
    }


def commit_shard(storage: Storage, plan: PatchPlan, unit: PatchUnit, data: bytes, patches: int) -> Commit:
    """Create the data file and its record; a file or record that is there already is adopted if it is the same work."""
    if storage.write_exclusive(unit.path, data):
        return _record(storage, _commit_of(plan, unit, patches, data))
    adopted = adopt(storage, plan, unit)
    if adopted is None:
        raise DataError(f"{storage.url(unit.path)} vanished while it was committed")
    return adopted


def adopt(storage: Storage, plan: PatchPlan, unit: PatchUnit) -> Commit | None:
    """Commit the data file that a killed or a second worker left, after verifying it; None if there is none.

    DataError if the file belongs to another plan, or its rows are not those that its footer promises.
    """
    try:
        data = storage.read_bytes(unit.path)
    except FileNotFoundError:
        return None
    metadata = _verified_metadata(storage, unit, data)
    wanted = footer(plan, unit, int(metadata["patches"]), metadata["content_sha256"])
    changed = differences({name: metadata.get(name) for name in wanted}, wanted)
    if changed:
        raise DataError(
            f"{storage.url(unit.path)} was made by other work: {'; '.join(changed)}; remove it or choose another output"
        )
    return _record(storage, _commit_of(plan, unit, int(metadata["patches"]), data))


def _verified_metadata(storage: Storage, unit: PatchUnit, data: bytes) -> Mapping[str, str]:
    """Footer of an encoded shard whose rows, patches and content hash were counted again."""
    parquet = open_shard(storage, unit.path, pa.BufferReader(data), PATCH_SCHEMA)
    metadata = {key.decode(): value.decode() for key, value in (parquet.metadata.metadata or {}).items()}
    content, documents, patches = ContentHash(), 0, 0
    for index in range(parquet.num_row_groups):
        table = read_row_group(storage, unit.path, parquet, index)
        content.update(table)
        documents += table.num_rows
        patches += sum(table["n_patches"].to_pylist())
    found = {"content_sha256": content.hexdigest, "documents": str(documents), "patches": str(patches)}
    changed = differences(found, {name: metadata.get(name) for name in found})
    if changed:
        raise DataError(
            f"{storage.url(unit.path)} is damaged: {'; '.join(changed)} (footer); remove it to have it made again"
        )
    return metadata


def _commit_of(plan: PatchPlan, unit: PatchUnit, patches: int, data: bytes) -> Commit:
    return Commit(
        id=unit.id,
        path=unit.path,
        documents=unit.documents,
        bytes=unit.bytes,
        patches=patches,
        sha256=hashlib.sha256(data).hexdigest(),
        plan=plan.hash,
    )


def _record(storage: Storage, commit: Commit) -> Commit:
    """Write the record, or find the same one there; DataError if the one there says something else."""
    path = f"{COMMITS}/{commit.id}.json"
    if not storage.write_exclusive(path, msgspec.json.encode(commit) + b"\n"):
        there = msgspec.json.decode(storage.read_bytes(path), type=Commit)
        if there != commit:
            raise DataError(
                f"commit {storage.url(path)} does not describe {storage.url(commit.path)}; "
                "remove both to have it made again"
            )
    return commit
