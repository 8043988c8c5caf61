"""A split of a patch dataset as what is evaluated: a unit for each row group, in stored order, with its patches."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from blt.checkpoint import LanguageModelConfig
from blt.errors import ConfigError, DataError
from pipelines.evaluate.documents import DocumentBatch, EvaluateUnit, Part, RowGroupUnit, UnitCounts
from pipelines.manifest import Patching, ShardEntry, SourceCounts, Split, read_manifest
from pipelines.model_patching import patching_differences
from pipelines.shard_file import open_shard
from pipelines.storage import Storage
from pipelines.train.row_group import decode_row_group, num_row_groups


@dataclass(frozen=True, kw_only=True)
class PatchedDocuments:
    """See `Documents`."""

    data: str
    """Root of the dataset, as any machine sees it."""
    split: Split
    patching: Patching
    shards: tuple[ShardEntry, ...]
    """Of the split."""
    fingerprint: str
    """Of the manifest."""

    @property
    def sources(self) -> Sequence[str]:
        return sorted({shard.source for shard in self.shards if shard.documents})

    @property
    def input_bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)

    def check_model(self, model: LanguageModelConfig, directory: str) -> None:
        """ConfigError, naming what differs, unless the patches are those that the model was trained on."""
        if differing := patching_differences(self.patching, model):
            raise ConfigError(
                f'key "data": the patches of {self.data} are not those that the model {directory} was trained on: '
                f"{'; '.join(differing)} (patch the documents with the model's entropy model and rule)"
            )

    def units(self) -> Sequence[EvaluateUnit]:
        storage = Storage(self.data)
        counts = [(shard.path, num_row_groups(storage, shard.path)) for shard in self.shards]
        places = [(path, row_group) for path, count in counts for row_group in range(count)]
        return [RowGroupUnit(number=n, path=path, row_group=group) for n, (path, group) in enumerate(places)]

    def unit_bytes(self, counts: UnitCounts) -> int:
        return counts.bytes

    def describe(self, unit: EvaluateUnit) -> str:
        assert isinstance(unit, RowGroupUnit)
        return f"row group {unit.row_group} of {Storage(self.data).url(unit.path)}"

    def read(self, unit: EvaluateUnit) -> Iterator[DocumentBatch]:
        assert isinstance(unit, RowGroupUnit)
        columns = ["doc_id", "source", "text", "n_bytes", "patch_starts"]
        with open_shard(Storage(self.data), unit.path, verify=False) as shard:
            table = shard.read(unit.row_group, columns)
        yield DocumentBatch(
            doc_ids=table["doc_id"].to_pylist(),
            sources=table["source"].to_pylist(),
            languages=[None] * table.num_rows,
            texts=table["text"].to_pylist(),
            group=decode_row_group(table, self.describe(unit)),
        )

    def texts(self, part: Part) -> Iterator[bytes]:
        storage = Storage(self.data)
        for entry in self.shards:
            if not part.holds(entry.source, None):
                continue
            with open_shard(storage, entry.path, verify=False) as shard:
                for table in shard.tables(["text"]):
                    yield from table["text"].to_pylist()

    def begin(self) -> None:
        pass

    def finish(self, counts: Sequence[UnitCounts]) -> Mapping[str, SourceCounts]:
        """DataError unless documents, bytes and patches of every shard are the manifest's."""
        counted = {shard.path: np.zeros(3, np.int64) for shard in self.shards}
        for part in counts:
            assert isinstance(part.unit, RowGroupUnit)
            counted[part.unit.path] += (part.documents, part.bytes, part.patches)
        for shard in self.shards:
            found, stated = counted[shard.path].tolist(), [shard.documents, shard.bytes, shard.patches]
            if found != stated:
                raise DataError(
                    f"shard {Storage(self.data).url(shard.path)} holds {found} documents, bytes and patches; "
                    f"the manifest says {stated}"
                )
        return {}


def open_patched(data: str, split: Split) -> PatchedDocuments:
    """A split of the patch dataset `data`; DataError if there is no such dataset, or no byte in the split."""
    manifest = read_manifest(data)
    if manifest.patching is None:
        raise DataError(
            f"{data} holds {manifest.kind}, but evaluation needs patches (the output of blt patch), or text as input"
        )
    shards = manifest.split(split)
    if not sum(shard.bytes for shard in shards):
        raise DataError(f"{data}: the {split} split holds no bytes to score")
    return PatchedDocuments(
        data=Storage(data).root_uri,
        split=split,
        patching=manifest.patching,
        shards=shards,
        fingerprint=manifest.fingerprint,
    )
