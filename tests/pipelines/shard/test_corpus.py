"""Whole corpora through Ray Data: complete, reconciled, the same at any parallelism, or a clear error."""

import dataclasses
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blt.errors import ConfigError, DataError
from pipelines.manifest import read_manifest
from pipelines.shard import ShardConfig, plan_corpus, shard_corpus
from tests.pipelines.shard.corpora import rows_of, shard, tree, without_ray

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_local")]


def _text(i: int) -> str:
    return f"document {i} of Größe " * (1 + i % 40)


def _corpus(root: Path) -> Path:
    """300 documents over every format, 20 each in fifteen files; three bad rows, two empty ones."""
    root.mkdir()
    for file in range(15):
        rows = [{"text": _text(i), "id": f"doc-{i}"} for i in range(20 * file, 20 * file + 20)]
        lines = "\n".join(json.dumps(row) for row in rows).encode()
        if file % 5 == 0:
            (root / f"{file}.jsonl").write_bytes(b'{"text": ""}\n\n' + lines + b"\ncut {")
        elif file % 5 == 1:
            (root / f"{file}.jsonl.gz").write_bytes(gzip.compress(lines, mtime=0))
        elif file % 5 == 2:
            (root / f"{file}.jsonl.zst").write_bytes(pa.compress(lines, codec="zstd", asbytes=True))
        elif file % 5 == 3:
            pq.write_table(pa.Table.from_pylist(rows), root / f"{file}.parquet")
        else:
            (root / "texts").mkdir(exist_ok=True)
            for row in rows:
                (root / "texts" / f"{row['id']}.txt").write_text(row["text"], encoding="utf-8")
    return root


def _config(root: Path, **settings: Any) -> ShardConfig:
    values = {"input": (str(root),), "valid_fraction": 0.1, "group_bytes": 20_000, "shard_bytes": 10_000, "source": "c"}
    return ShardConfig(**(values | settings))


def test_all_formats_become_one_reconciled_dataset(tmp_path: Path) -> None:
    config = _config(_corpus(tmp_path / "in"))
    plan = plan_corpus(config)
    assert len(plan.groups) >= 6
    done: list[int] = []
    manifest = shard_corpus(plan, config, str(tmp_path / "out"), done.append)
    assert sum(done) == plan.input_bytes
    assert len(done) == len(plan.groups)
    assert manifest == read_manifest(str(tmp_path / "out"))
    counts = manifest.counts["c"]
    assert (counts.rows_in, counts.rows_out, counts.quarantined, counts.filtered) == (306, 300, 3, 3)
    rows = rows_of(tmp_path / "out", manifest)
    assert sorted(row["text"].decode() for row in rows) == sorted(map(_text, range(300)))
    by_id = {row["doc_id"].removeprefix("texts/").removesuffix(".txt"): row["text"].decode() for row in rows}
    assert by_id == {f"doc-{i}": _text(i) for i in range(300)}
    assert manifest.split("train")
    assert manifest.split("valid")
    assert sum(len(file.read_text().splitlines()) for file in (tmp_path / "out" / "quarantine").iterdir()) == 3


@pytest.mark.parametrize("dedup", [False, True])
def test_parallelism_does_not_show_in_the_bytes(tmp_path: Path, dedup: bool) -> None:
    config = _config(_corpus(tmp_path / "in"), dedup=dedup)
    shard(config, tmp_path / "parallel")
    with without_ray():
        shard(config, tmp_path / "serial")
    assert tree(tmp_path / "serial") == tree(tmp_path / "parallel")


def test_a_run_that_was_cut_off_is_completed(tmp_path: Path) -> None:
    config = _config(_corpus(tmp_path / "in"))
    manifest = shard(config, tmp_path / "out")
    whole = tree(tmp_path / "out")
    for path in ("manifest.json", "_commits/group-00001.json", "_commits/group-00003.json", manifest.shards[3].path):
        (tmp_path / "out" / path).unlink()
    untouched = tmp_path / "out" / "_commits/group-00002.json"
    before = untouched.stat().st_mtime_ns
    assert shard(config, tmp_path / "out") == manifest
    assert untouched.stat().st_mtime_ns == before
    assert tree(tmp_path / "out") == whole


@pytest.mark.parametrize("change", ["seed", "content", "file"])
def test_another_plan_does_not_mix_with_what_is_there(tmp_path: Path, change: str) -> None:
    config = _config(_corpus(tmp_path / "in"))
    shard(config, tmp_path / "out")
    whole = tree(tmp_path / "out")
    if change == "seed":
        config = dataclasses.replace(config, seed=1)
    elif change == "content":
        text = (tmp_path / "in" / "0.jsonl").read_text()
        (tmp_path / "in" / "0.jsonl").write_text(text.replace("document 7 ", "document 9 "))
    else:
        (tmp_path / "in" / "more.txt").write_text("one more")
    with pytest.raises(DataError, match=f"{'seed is 0 there, 1 here' if change == 'seed' else 'inputs is'}"):
        shard(config, tmp_path / "out")
    assert tree(tmp_path / "out") == whole


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "0 rows read"),
        ("\n \n", "0 rows read"),
        ('{"text": ""}', "1 filtered out by min_bytes=1"),
        ('{"body": "a"}\n{"body": "b"}', r"2 refused.*a\.jsonl:1: .*`text` \(keys: body\)"),
        ('{"text": "a"}', "needs at least two different documents"),
        ('{"text": "a"}\n{"text": "a"}', "needs at least two different documents"),
    ],
)
def test_a_corpus_that_makes_no_dataset_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(DataError, match=message) as error:
        shard(_config(tmp_path / "a.jsonl"), tmp_path / "out")
    assert str(tmp_path / "a.jsonl") in str(error.value)
    assert tree(tmp_path / "out") == {}


@pytest.mark.parametrize(("fraction", "empty"), [(0.001, "valid"), (0.999, "train")])
def test_an_empty_split_says_which_fraction_would_do(tmp_path: Path, fraction: float, empty: str) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": f"document {i}"}) for i in range(8)))
    config = _config(tmp_path / "a.jsonl", valid_fraction=fraction)
    with pytest.raises(DataError, match=f"{empty} split .* set valid_fraction=0") as error:
        shard(config, tmp_path / "out")
    advised = float(str(error.value).partition("set valid_fraction=")[2].split()[0])
    manifest = shard(dataclasses.replace(config, valid_fraction=advised), tmp_path / "out")  # into the same output
    assert manifest.documents == 8
    assert manifest.split("valid")
    assert manifest.split("train")


def test_documents_that_share_an_id_are_all_kept(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": f"text {i}", "id": 7}) for i in range(50)))
    manifest = shard(_config(tmp_path / "a.jsonl"), tmp_path / "out")
    rows = rows_of(tmp_path / "out", manifest)
    assert len({row["text"] for row in rows}) == 50
    assert {row["doc_id"] for row in rows} == {"7"}


def test_an_error_in_a_task_arrives_as_it_was_raised(tmp_path: Path) -> None:
    config = _config(_corpus(tmp_path / "in"))
    group = plan_corpus(config).groups[2]
    (tmp_path / "out" / "train").mkdir(parents=True)
    (tmp_path / "out" / "train" / f"shard-{group.index:05d}-00000.parquet").write_bytes(b"mine")
    with pytest.raises(DataError, match="exists and holds something else"):
        shard(config, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_output_inside_the_input_is_refused(tmp_path: Path) -> None:
    _corpus(tmp_path / "in")
    with pytest.raises(ConfigError, match="lies inside the output"):
        shard(_config(tmp_path / "in"), tmp_path)


@pytest.mark.parametrize("pattern", ["", "/**/*.jsonl"])
def test_output_that_the_input_would_read_is_refused_before_anything_is_written(tmp_path: Path, pattern: str) -> None:
    _corpus(tmp_path / "in")
    config = _config(f"{tmp_path / 'in'}{pattern}")
    with pytest.raises(ConfigError, match=r"output .*in/out lies inside input .*in"):
        shard(config, tmp_path / "in" / "out")
    assert not (tmp_path / "in" / "out").exists()


def test_output_that_the_input_passes_over_is_fine(tmp_path: Path) -> None:
    _corpus(tmp_path / "in")
    shard(_config(f"{tmp_path / 'in'}"), tmp_path / "in" / "_documents")
    shard(_config(f"{tmp_path / 'in'}/*.jsonl"), tmp_path / "in" / "documents")
