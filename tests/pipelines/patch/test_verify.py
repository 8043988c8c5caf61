"""Verification: a dataset as it was made has no problem; each kind of damage is found and named."""

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blt.errors import ConfigError, DataError
from blt.patching import PatchRule
from pipelines.manifest import ShardEntry, read_manifest, write_manifest
from pipelines.patch import PatchConfig, patch_dataset
from pipelines.patch.verify import Verification, sample_rows, verify_dataset
from pipelines.schema import pack_starts, unpack_starts
from tests.parquet_bytes import encode_parquet
from tests.pipelines.patch.corpus import EDGE_DOCUMENTS, prose, write_documents
from tests.pipelines.patch.in_process import use_in_process_pool

PATH = "train/shard-00000.parquet"
TEXTS = [prose(0, 1500), *EDGE_DOCUMENTS, prose(1, 90)]
CONFIG = PatchConfig(
    rule=PatchRule(threshold=4.0, max_patch_length=64), row_group_bytes=1200, row_bytes=512, store_entropies=True
)
Row = dict[str, Any]


@pytest.fixture(autouse=True)
def _pool(monkeypatch: pytest.MonkeyPatch) -> None:
    use_in_process_pool(monkeypatch)


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> str:
    shards = {PATH: TEXTS, "valid/shard-00000.parquet": [prose(9, 400), b""], "valid/shard-00001.parquet": []}
    return write_documents(tmp_path_factory.mktemp("verify") / "documents", shards)


class _Dataset:
    """A patch dataset that a test may damage."""

    def __init__(self, documents: str, model: str, root: Path) -> None:
        self.documents, self.model, self.root = documents, model, root
        patch_dataset(CONFIG, documents, model, str(root))

    def verify(self, config: PatchConfig = CONFIG) -> Verification:
        return verify_dataset(config, self.documents, self.model, str(self.root))

    def rewrite(self, change: Callable[[list[Row]], None]) -> None:
        """Change rows of the first shard and make manifest and file agree on the hash, as a faulty writer would."""
        file = pq.ParquetFile(self.root / PATH)
        groups = [file.read_row_group(index) for index in range(file.num_row_groups)]
        rows = [row for group in groups for row in group.to_pylist()]
        change(rows)
        schema = file.schema_arrow.remove_metadata()
        tables, first = [], 0
        for group in groups:
            tables.append(pa.Table.from_pylist(rows[first : first + group.num_rows], schema=schema))
            first += group.num_rows
        footer = {key.decode(): value.decode() for key, value in file.metadata.metadata.items()}
        footer = {key: value for key, value in footer.items() if key not in ("schema_version", "ARROW:schema")}
        data = encode_parquet(tables, schema, footer)
        (self.root / PATH).write_bytes(data)
        self._enter(hashlib.sha256(data).hexdigest())

    def _enter(self, sha256: str) -> None:
        manifest = read_manifest(str(self.root))
        shards = [
            msgspec.structs.replace(shard, sha256=sha256) if shard.path == PATH else shard for shard in manifest.shards
        ]
        write_manifest(str(self.root), dataclasses.replace(manifest, shards=tuple(shards)))


@pytest.fixture
def dataset(documents: str, entropy_model_directory: str, tmp_path: Path) -> _Dataset:
    return _Dataset(documents, entropy_model_directory, tmp_path / "patches")


def test_a_dataset_as_it_was_made_has_no_problem(dataset: _Dataset) -> None:
    before = {path: path.stat().st_mtime_ns for path in dataset.root.rglob("*")}
    found = dataset.verify()
    assert found.problems == ()
    manifest = read_manifest(str(dataset.root))
    assert (found.shards, found.documents, found.bytes) == (3, manifest.documents, manifest.bytes)
    assert found.patches == sum(shard.patches or 0 for shard in manifest.shards)
    assert found.recomputed_documents == manifest.documents
    assert {path: path.stat().st_mtime_ns for path in dataset.root.rglob("*")} == before


def _set_starts(row: Row, change: Callable[[np.ndarray], None]) -> None:
    starts = unpack_starts(row["patch_starts"], row["n_bytes"]).copy()
    change(starts)
    row["patch_starts"] = pack_starts(starts)
    row["n_patches"] = int(starts[:-1].sum())


def _clear_first(rows: list[Row]) -> None:
    _set_starts(rows[0], lambda starts: starts.__setitem__(0, False))


def _merge(rows: list[Row]) -> None:
    _set_starts(rows[0], lambda starts: starts.__setitem__(slice(1, 1000), False))


def _set_padding(rows: list[Row]) -> None:
    assert rows[1]["n_bytes"] == 0
    rows[1]["patch_starts"] = bytes([rows[1]["patch_starts"][0] | 0x80])


def _miscount(rows: list[Row]) -> None:
    rows[2]["n_patches"] += 1


def _move(rows: list[Row]) -> None:
    _set_starts(rows[0], lambda starts: starts.__setitem__(700, not starts[700]))


def _change_text(rows: list[Row]) -> None:
    rows[2]["text"] = b"b"


def _change_entropies(rows: list[Row]) -> None:
    rows[0]["entropies"] = bytes([rows[0]["entropies"][0] ^ 1]) + rows[0]["entropies"][1:]  # H at BOS decides nothing


def _shorten_entropies(rows: list[Row]) -> None:
    rows[0]["entropies"] = rows[0]["entropies"][:-1]


def _shorten_starts(rows: list[Row]) -> None:
    rows[0]["patch_starts"] = rows[0]["patch_starts"][:-1]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (_clear_first, "row 0: patch_starts: bit 0 is not set"),
        (_merge, "max_patch_length is 64"),
        (_set_padding, "row 1: patch_starts: bits after the last are set"),
        (_miscount, "row 2: n_patches is 2, patch_starts holds 1"),
        (_move, "row 0: patch_starts differ from what the model gives"),
        (_change_text, "are not those of"),
        (_change_entropies, "row 0: entropies differ from what the model gives"),
        (_shorten_entropies, "row 0: entropies has 1500 values for 1500 bytes"),
        (_shorten_starts, "row 0: patch_starts has 187 bytes"),
    ],
)
def test_damaged_rows_are_found(dataset: _Dataset, change: Callable[[list[Row]], None], problem: str) -> None:
    dataset.rewrite(change)
    found = dataset.verify()
    assert any(problem in line and PATH in line for line in found.problems), found.problems
    assert any("footer: content_sha256" in line for line in found.problems) or change is _miscount
    assert found.num_problems == len(found.problems)


def test_a_sample_of_nothing_still_checks_every_file(dataset: _Dataset) -> None:
    dataset.rewrite(_move)
    found = dataset.verify(dataclasses.replace(CONFIG, verify_documents=0))
    assert found.recomputed_documents == 0
    assert [line.partition(": ")[2].partition(" is ")[0] for line in found.problems if "footer" in line] == [
        "footer: content_sha256",
        "footer: patches",
    ]


def test_missing_torn_and_foreign_files_are_found(dataset: _Dataset) -> None:
    (dataset.root / "valid/shard-00000.parquet").unlink()
    whole = (dataset.root / PATH).read_bytes()
    (dataset.root / PATH).write_bytes(whole[:-50])
    (dataset.root / "train/shard-00009.parquet").write_bytes(whole)
    problems = dataset.verify().problems
    assert any("valid/shard-00000.parquet: is in the manifest but does not exist" in line for line in problems)
    assert any("train/shard-00000.parquet: has sha256" in line for line in problems)
    assert any("train/shard-00009.parquet is there and not in the manifest" in line for line in problems)


def test_other_documents_are_found(dataset: _Dataset, tmp_path: Path) -> None:
    dataset.documents = write_documents(tmp_path / "others", {PATH: [b"others"], "train/shard-00001.parquet": [b"x"]})
    problems = dataset.verify().problems
    assert "was made from documents" in problems[0]
    assert "train/shard-00001.parquet is a shard of the documents and not in the manifest" in problems[1]


def test_what_a_recomputation_needs_is_asked_for(dataset: _Dataset, documents: str) -> None:
    with pytest.raises(ConfigError, match="entropy_model is needed to make 64 documents again; or set verify_doc"):
        verify_dataset(CONFIG, documents, None, str(dataset.root))
    with pytest.raises(ConfigError, match="device must be cpu"):
        dataset.verify(dataclasses.replace(CONFIG, device="cuda", gpus_per_actor=1))
    with pytest.raises(DataError, match="is a dataset of documents"):
        verify_dataset(CONFIG, documents, None, documents)
    manifest = read_manifest(str(dataset.root))
    assert manifest.patching is not None
    write_manifest(
        str(dataset.root),
        dataclasses.replace(manifest, patching=dataclasses.replace(manifest.patching, dtype="bfloat16")),
    )
    with pytest.raises(DataError, match="describe different patching"):
        dataset.verify()


def test_the_sample_is_seeded_and_spread_over_all_documents() -> None:
    shards = [
        ShardEntry(path=f"{i}", split="train", source="s", documents=n, bytes=0, sha256="")
        for i, n in enumerate([5, 0, 1, 94])
    ]
    rows = sample_rows(shards, 10)
    assert rows == sample_rows(shards, 10)
    assert sum(map(len, rows)) == 10
    assert all(0 <= row < shard.documents for shard, found in zip(shards, rows, strict=True) for row in found)
    assert [len(found) for found in sample_rows(shards, 1000)] == [5, 0, 1, 94]
    assert sample_rows([], 10) == []
