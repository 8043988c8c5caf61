"""Corpora of several sources in all formats: split or whole, with and without duplicates, in any order of tasks."""

import dataclasses
import json
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from blt.errors import ConfigError, DataError
from pipelines.manifest import Manifest, read_manifest
from pipelines.shard import ShardConfig, SourceConfig, corpus, dedup, duplicates, hash_runs, plan_corpus, shard_corpus
from tests.pipelines.shard.corpora import FORMATS, rows_of, shard, tree, without_ray, write_texts

# Few different texts, so that most have equals; the two long ones are in both splits at valid_fraction 0.5.
TEXTS = st.sampled_from(["", "a", "b", "Größe", "c" * 40, "alpha " * 9, "beta " * 9])
FILES = st.lists(st.tuples(st.sampled_from("xyz"), st.sampled_from(FORMATS), st.lists(TEXTS, max_size=6)), max_size=5)
File = tuple[str, str, list[str]]

ANCHORS = ["alpha " * 9, "beta " * 9, "anchor 1", "anchor 2", "anchor 3", "anchor 4"]


def _corpus(root: Path, files: list[File]) -> tuple[SourceConfig, ...]:
    """Files by source below `root`; source "w" always has some documents."""
    write_texts(root / "w", "anchors", "jsonl", ANCHORS)
    for number, (source, suffix, texts) in enumerate(files):
        write_texts(root / source, f"{number}", suffix, texts)
    return tuple(
        SourceConfig(name=directory.name, input=(str(directory),))
        for directory in sorted(root.iterdir(), reverse=True)
        if any(directory.iterdir())
    )


def _naive(config: ShardConfig) -> list[tuple[str, str, int]]:
    """(source, doc_id, index) of what stays, by a set: files as Python reads them."""
    whole = dataclasses.replace(config, dedup=False, group_bytes=2**20)
    with tempfile.TemporaryDirectory() as directory:
        rows = rows_of(Path(directory), shard(whole, Path(directory)))
    seen, kept = set[bytes](), list[tuple[str, str, int]]()
    for row in sorted(rows, key=lambda row: (row["source"], *_place(row["doc_id"]))):
        if row["text"] not in seen:
            seen.add(row["text"])
            kept.append((row["source"], *_place(row["doc_id"])))
    return kept


def _place(doc_id: str) -> tuple[str, int]:
    name, _, offset = doc_id.partition(":")
    return name, int(offset or 0)


def _places(root: Path, manifest: Manifest) -> list[tuple[str, str, int]]:
    return sorted((row["source"], *_place(row["doc_id"])) for row in rows_of(root, manifest))


@given(FILES, st.sampled_from([60, 400, 10_000]), st.sampled_from([1, 3, 2**21]), st.sampled_from([200, 2**20]))
@example([("x", "jsonl", ["a"] * 8), ("y", "parquet", ["a"] * 8), ("x", "txt.zst", ["a"] * 3)], 60, 3, 100)
@settings(max_examples=10)
def test_dedup_keeps_what_a_set_keeps(files: list[File], group: int, run_records: int, partition: int) -> None:
    with tempfile.TemporaryDirectory() as directory, without_ray(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(hash_runs, "RUN_RECORDS", run_records)
        patch.setattr(duplicates, "PARTITION_BYTES", partition)
        patch.setattr(duplicates, "_CHUNK_RECORDS", 2)
        root = Path(directory)
        config = ShardConfig(
            sources=_corpus(root / "in", files), valid_fraction=0.5, group_bytes=group, shard_bytes=100, dedup=True
        )
        try:
            manifest = shard(config, root / "out")
        except DataError as error:
            pytest.fail(str(error))
        assert _places(root / "out", manifest) == _naive(config)
        kept = Counter(source for source, _, _ in _places(root / "out", manifest))
        for source in config.all_sources:
            counts = manifest.counts[source.name]
            assert counts.rows_out == kept[source.name]
            assert counts.rows_in == _rows_in(source.name, files)
        assert not any(
            path.startswith("_") and "_commits" not in path and "_plan" not in path for path in tree(root / "out")
        )


def _rows_in(source: str, files: list[File]) -> int:
    return sum(len(texts) for name, _, texts in files if name == source) + len(ANCHORS) * (source == "w")


@given(FILES, st.sampled_from([30, 200]), st.integers(0, 2))
@settings(max_examples=8)
def test_splitting_files_changes_no_document_and_no_id(files: list[File], group: int, seed: int) -> None:
    with tempfile.TemporaryDirectory() as directory, without_ray():
        root = Path(directory)
        whole = ShardConfig(sources=_corpus(root / "in", files), valid_fraction=0.5, seed=seed)
        split = dataclasses.replace(whole, group_bytes=group)
        found = [rows_of(root / name, shard(config, root / name)) for name, config in (("a", whole), ("b", split))]
        assert sorted(found[0], key=str) == sorted(found[1], key=str)


def test_every_shard_is_of_one_source(tmp_path: Path) -> None:
    files: list[File] = [(source, "jsonl", [f"{source} {i}" for i in range(30)]) for source in "xy"]
    config = ShardConfig(sources=_corpus(tmp_path / "in", files), valid_fraction=0.3, shard_bytes=60)
    with without_ray():
        manifest = shard(config, tmp_path / "out")
    assert list(manifest.counts) == ["w", "x", "y"]
    assert {entry.source for entry in manifest.split("valid")} >= {"x", "y"}
    for entry in manifest.shards:
        file = pq.ParquetFile(tmp_path / "out" / entry.path)
        assert set(file.read(["source"])["source"].to_pylist()) == {entry.source}
        assert file.metadata.metadata[b"source"].decode() == entry.source


def test_licences_stand_in_the_manifest_and_change_no_file(tmp_path: Path) -> None:
    files: list[File] = [(source, "jsonl", [f"{source} {i}" for i in range(30)]) for source in "xy"]
    sources = _corpus(tmp_path / "in", files)
    config = ShardConfig(sources=sources, valid_fraction=0.3)
    named = [dataclasses.replace(s, license="CC-BY-4.0" if s.name == "x" else None) for s in sources]
    with without_ray():
        manifests = [
            shard(config, tmp_path / "out"),
            shard(dataclasses.replace(config, sources=tuple(named)), tmp_path / "licensed"),
        ]
    assert [manifest.licenses for manifest in manifests] == [{}, {"x": "CC-BY-4.0"}]
    assert manifests[0].fingerprint == manifests[1].fingerprint
    assert read_manifest(str(tmp_path / "licensed")) == manifests[1]
    trees = [tree(tmp_path / name) for name in ("out", "licensed")]
    assert {path for path in trees[0] if trees[0][path] != trees[1][path]} == {"manifest.json"}


@pytest.mark.parametrize("license", ["", " ", "two\nlines"])
def test_a_licence_is_a_few_words(license: str) -> None:
    with pytest.raises(ConfigError, match="license must be printable and not empty"):
        ShardConfig(input=("x",), license=license)
    with pytest.raises(ConfigError, match="license must be printable and not empty"):
        SourceConfig(name="x", input=("x",), license=license)


@pytest.mark.parametrize("group_bytes", [150, 2**20])
def test_quarantine_has_absolute_lines_also_of_split_files(tmp_path: Path, group_bytes: int) -> None:
    (tmp_path / "in").mkdir()
    lines = ["broken" if i % 7 == 3 else "" if i % 5 == 0 else json.dumps({"text": f"text {i}"}) for i in range(90)]
    (tmp_path / "in" / "a.jsonl").write_text("\n".join(lines))
    config = ShardConfig(input=(str(tmp_path / "in"),), valid_fraction=0.3, group_bytes=group_bytes)
    with without_ray():
        manifest = shard(config, tmp_path / "out")
    records = [json.loads(line) for file in (tmp_path / "out" / "quarantine").iterdir() for line in file.open()]
    content = (tmp_path / "in" / "a.jsonl").read_bytes()
    assert sorted(record["line"] for record in records) == [i + 1 for i, line in enumerate(lines) if line == "broken"]
    for record in records:
        assert record.keys() == {"source", "file", "line", "offset", "rows", "reason"}
        assert (record["source"], record["file"], record["rows"]) == ("corpus", "a.jsonl", 1)
        assert content[record["offset"] :].startswith(b"broken")
        assert content[: record["offset"]].count(b"\n") == record["line"] - 1
    assert manifest.counts["corpus"].quarantined == len(records)
    assert not (tmp_path / "out" / "_quarantine").exists()


@pytest.mark.parametrize("stage", ["write_runs", "find_losers", "write_group", "finish_quarantine", "write_manifest"])
def test_a_run_cut_off_anywhere_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    files: list[File] = [("x", f, [f"{i % 4} {f}" for i in range(6)]) for f in ("jsonl", "jsonl.zst", "parquet")]
    sources = _corpus(tmp_path / "in", files)
    (tmp_path / "in" / "w" / "bad.jsonl").write_text("broken\n" * 40)
    config = ShardConfig(sources=sources, valid_fraction=0.5, group_bytes=200, dedup=True)
    monkeypatch.setattr(duplicates, "PARTITION_BYTES", 300)
    with without_ray():
        manifest = shard(config, tmp_path / "whole")
        with monkeypatch.context() as patch:
            _fail_after(patch, stage, 1 if stage != "write_manifest" else 0)
            with pytest.raises(KeyboardInterrupt):
                shard(config, tmp_path / "out")
        assert not (tmp_path / "out" / "manifest.json").exists()
        assert shard(config, tmp_path / "out") == manifest
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def _fail_after(patch: pytest.MonkeyPatch, stage: str, completed: int) -> None:
    """Interrupt a run where it calls `stage` for the next time after so many."""
    module = dedup if stage in ("write_runs", "find_losers") else corpus
    real, calls = getattr(module, stage), iter(range(completed))

    def interrupted(*arguments: object) -> object:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return real(*arguments)

    patch.setattr(module, stage, interrupted)


def test_a_driver_that_comes_second_takes_what_the_first_has_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = _corpus(tmp_path / "in", [("x", "jsonl", ["a", "b", "a"])])
    config = ShardConfig(sources=sources, valid_fraction=0.5, group_bytes=30, dedup=True)
    real = corpus.find_duplicates

    def overtaken(*arguments: object) -> int:
        partitions = real(*arguments)  # type: ignore[arg-type]
        with monkeypatch.context() as patch:
            patch.setattr(corpus, "find_duplicates", real)
            shard(config, tmp_path / "out")  # removes what it needed
        return partitions

    with without_ray():
        monkeypatch.setattr(corpus, "find_duplicates", overtaken)
        manifest = shard(config, tmp_path / "out")
        monkeypatch.setattr(corpus, "find_duplicates", real)
        assert manifest == shard(config, tmp_path / "alone")


def test_an_input_that_changes_between_the_passes_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = _corpus(tmp_path / "in", [("x", "jsonl", ["a", "b", "a"])])
    config = ShardConfig(sources=sources, valid_fraction=0.5, dedup=True)
    real = corpus.find_duplicates

    def changed(*arguments: object) -> int:
        partitions = real(*arguments)  # type: ignore[arg-type]
        (tmp_path / "in" / "x" / "0.jsonl").write_text(json.dumps({"text": "other"}) + "\n")
        return partitions

    monkeypatch.setattr(corpus, "find_duplicates", changed)
    with without_ray(), pytest.raises(DataError, match="changed while its duplicates were looked for"):
        shard(config, tmp_path / "out")


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 2), st.integers(0, 5)), max_size=40))
def test_records_that_repeat_a_hash_come_after_the_first_by_place(rows: list[tuple[int, int, int, int]]) -> None:
    records = np.array([(h << 62, low, rank, offset) for h, low, rank, offset in rows], dtype=hash_runs.RECORD)
    order, repeats = hash_runs.order_by_hash(records)
    assert records[order].tolist() == sorted(records.tolist())
    kept = records[order[~repeats]].tolist()
    assert [row[:2] for row in kept] == sorted({row[:2] for row in records.tolist()})


def test_progress_counts_every_pass(tmp_path: Path) -> None:
    config = ShardConfig(sources=_corpus(tmp_path / "in", []), valid_fraction=0.5, group_bytes=40, dedup=True)
    plan, done = plan_corpus(config), list[int]()
    with without_ray():
        shard_corpus(plan, config, str(tmp_path / "out"), done.append)
        assert sum(done) == 2 * plan.input_bytes
        shard_corpus(plan, config, str(tmp_path / "out"), done.append)  # all of it is there
    assert sum(done) == 4 * plan.input_bytes
