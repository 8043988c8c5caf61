"""docs/datasets.md: its snippets run and agree, and its tables name the columns, keys and fields that there are."""

import dataclasses
import re
from pathlib import Path

import pytest

from pipelines.manifest import Manifest, ShardEntry, SourceCounts
from pipelines.patch.data_file import footer
from pipelines.patch.plan import PatchConfig, make_plan, unit_of
from pipelines.schema import patch_schema
from tests.pipelines.train.patched import patched, random_document, write_patches

DOCUMENT = (Path(__file__).parent.parent / "docs" / "datasets.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```", DOCUMENT, re.MULTILINE | re.DOTALL)


def named(heading: str) -> set[str]:
    """Names in the first column of the table below a heading."""
    section = DOCUMENT.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    cells = re.findall(r"^\|([^|]*)\|", section, re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


@pytest.mark.parametrize("snippet", SNIPPETS, ids=[re.findall(r"import (\w+)", snippet)[-1] for snippet in SNIPPETS])
def test_every_reader_finds_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, snippet: str) -> None:
    first = random_document(3, 500)
    train = [first, patched(b"", []), *(random_document(seed, 77) for seed in range(8))]
    valid = [random_document(99, 300)]
    write_patches(tmp_path / "patches", {"train/shard-00000.parquet": train, "valid/shard-00000.parquet": valid})
    monkeypatch.chdir(tmp_path)
    found: dict[str, object] = {}
    exec(snippet, found)
    assert found["documents"] == len(train) + len(valid)
    assert found["num_bytes"] == sum(len(document.text) for document in [*train, *valid])
    assert found["num_patches"] == sum(document.num_patches for document in [*train, *valid])
    assert found["starts"] == [place for place, start in enumerate(first.starts[:-1]) if start]


def test_there_is_a_snippet_for_each_reader() -> None:
    readers = [set(re.findall(r"^import (\w+)", snippet, re.MULTILINE)) for snippet in SNIPPETS]
    assert [names - {"numpy", "json"} for names in readers] == [{"pipelines"}, {"pyarrow"}, {"duckdb"}, {"polars"}]


def test_tables_name_what_there_is() -> None:
    assert named("Columns") == set(patch_schema(with_entropies=True).names)
    assert named("Manifest") == {field.name for field in dataclasses.fields(Manifest)}


def test_the_footer_of_a_patch_file_is_documented() -> None:
    shard = ShardEntry(path="train/s.parquet", split="train", source="a", documents=1, bytes=1, sha256="")
    counts = SourceCounts(rows_in=1, rows_out=1, quarantined=0, filtered=0, bytes=1)
    plan = make_plan(PatchConfig(), Manifest(kind="documents", shards=(shard,), counts={"a": counts}), "model")
    assert set(footer(plan, unit_of(shard), 1, "")) | {"schema_version", "source", "split"} == named("Footer")
