"""The data file of a shard: its footer, and the check of a file that a killed or a second worker left.

A file that is there already is never replaced: it is verified a row group at a time and adopted, or refused by name.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import msgspec
import pyarrow as pa

from blt.errors import DataError
from pipelines.patch.plan import PatchPlan, PatchUnit, differences
from pipelines.patch.rows import ContentHash
from pipelines.schema import patch_schema, write_parquet
from pipelines.shard_file import open_shard
from pipelines.storage import Storage


@dataclass(frozen=True, kw_only=True)
class DataFile:
    """A whole data file, written or found."""

    patches: int
    sha256: str
    size_bytes: int


@dataclass(kw_only=True)
class _Tally:
    """What the rows of a file add up to."""

    documents: int = 0
    patches: int = 0
    content: ContentHash = field(default_factory=ContentHash)

    def update(self, table: pa.Table) -> None:
        self.documents += table.num_rows
        self.patches += sum(table["n_patches"].to_pylist())
        self.content.update(table)


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


def create_data_file(storage: Storage, plan: PatchPlan, unit: PatchUnit, tables: Iterable[pa.Table]) -> DataFile | None:
    """Stream the row groups into the shard's data file; None if one is there already, which is left as it is."""
    tally, metadata = _Tally(), dict[str, str]()

    def counted() -> Iterator[pa.Table]:
        for table in tables:
            tally.update(table)
            yield table
        metadata.update(footer(plan, unit, tally.patches, tally.content.hexdigest))

    with storage.create(unit.path) as new:
        write_parquet(new, counted(), patch_schema(plan.store_entropies), metadata)
    if not new.created:
        return None
    return DataFile(patches=tally.patches, sha256=new.sha256, size_bytes=new.size_bytes)


def find_data_file(storage: Storage, plan: PatchPlan, unit: PatchUnit) -> DataFile | None:
    """The data file that is there, verified; None if there is none.

    DataError if it belongs to another plan, or its rows are not those that its footer promises.
    """
    if not storage.exists(unit.path):
        return None
    size_bytes, metadata = _verified(storage, plan, unit)
    wanted = footer(plan, unit, int(metadata["patches"]), metadata["content_sha256"])
    changed = differences({name: metadata.get(name) for name in wanted}, wanted)
    if changed:
        raise DataError(
            f"{storage.url(unit.path)} was made by other work: {'; '.join(changed)}; remove it or choose another output"
        )
    return DataFile(patches=int(metadata["patches"]), sha256=storage.sha256(unit.path), size_bytes=size_bytes)


def _verified(storage: Storage, plan: PatchPlan, unit: PatchUnit) -> tuple[int, Mapping[str, str]]:
    """Size and footer of a data file whose rows, patches and content hash were counted again."""
    with open_shard(storage, unit.path, patch_schema(plan.store_entropies)) as file:
        tally, metadata = _Tally(), file.footer
        for table in file.tables():
            tally.update(table)
        size_bytes = file.size_bytes
    found = {
        "content_sha256": tally.content.hexdigest,
        "documents": str(tally.documents),
        "patches": str(tally.patches),
    }
    changed = differences(found, {name: metadata.get(name) for name in found})
    if changed:
        raise DataError(
            f"{storage.url(unit.path)} is damaged: {'; '.join(changed)} (footer); remove it to have it made again"
        )
    return size_bytes, metadata
