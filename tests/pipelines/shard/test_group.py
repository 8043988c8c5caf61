"""One group: bounded, reconciled, the same bytes however often it is run, also after kill -9."""

import dataclasses
import functools
import gzip
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from blt.errors import DataError
from pipelines.shard.config import ShardConfig
from pipelines.shard.duplicates import Duplicates
from pipelines.shard.group import GroupReceipt, receipt_path, write_group
from pipelines.shard.plan import Group, plan_corpus, split_position
from pipelines.storage import Storage
from tests.pipelines.shard.corpora import tree
from tests.processes import stops_when
from tests.waiting import wait_for


def _corpus(root: Path, documents: int = 400) -> Path:
    """Two files of documents of 1 to 400 bytes, a bad line and an empty text in each."""
    root.mkdir(exist_ok=True)
    for half in (0, 1):
        rows = [{"text": f"{half}.{i} " * (1 + i % 60), "id": f"{half}-{i}"} for i in range(documents // 2)]
        lines = [json.dumps(row).encode() for row in rows]
        lines[7:7] = [b"broken", b'{"text": ""}']
        (root / f"{half}.jsonl.gz").write_bytes(gzip.compress(b"\n".join(lines), mtime=0))
    return root


def _config(root: Path, **settings: Any) -> ShardConfig:
    values = {"input": (str(root),), "valid_fraction": 0.2, "shard_bytes": 20_000, "row_group_bytes": 5_000}
    return ShardConfig(**(values | settings))


def _write(config: ShardConfig, output: Path) -> GroupReceipt:
    (group,) = plan_corpus(dataclasses.replace(config, group_bytes=2**27)).groups
    return _write_one(group, config, output)


def _write_one(group: Group, config: ShardConfig, output: Path) -> GroupReceipt:
    storage = Storage(str(output))
    return write_group(group, config, storage, Duplicates(group.index, 1, 0, storage))


@pytest.mark.parametrize("group_bytes", [2**27, 100_000, 1])
def test_every_document_is_written_once_and_counts_reconcile(tmp_path: Path, group_bytes: int) -> None:
    config = _config(_corpus(tmp_path / "in"), group_bytes=group_bytes)
    receipt = _write(config, tmp_path / "out")
    counts = receipt.counts
    assert (counts.rows_in, counts.rows_out, counts.quarantined, counts.filtered) == (404, 400, 2, 2)
    ids: list[str] = []
    for shard in receipt.shards:
        file = tmp_path / "out" / shard.path
        assert hashlib.sha256(file.read_bytes()).hexdigest() == shard.sha256
        rows = pq.read_table(file).to_pylist()
        assert (len(rows), sum(row["n_bytes"] for row in rows)) == (shard.documents, shard.bytes)
        for row in rows:
            assert row["n_bytes"] == len(row["text"])
            assert shard.split == ("valid" if split_position(hashlib.sha256(row["text"]).digest()) < 0.2 else "train")
        ids += [row["doc_id"] for row in rows]
    assert sorted(ids) == sorted(f"{half}-{i}" for half in (0, 1) for i in range(200))
    quarantine = [
        json.loads(line) for name in receipt.quarantine for line in (tmp_path / "out" / "_quarantine" / name).open()
    ]
    assert [(q["source"], q["file"], q["line"], q["rows"]) for q in sorted(quarantine, key=lambda q: q["file"])] == [
        ("corpus", "0.jsonl.gz", 8, 1),
        ("corpus", "1.jsonl.gz", 8, 1),
    ]
    content = gzip.decompress((tmp_path / "in" / "0.jsonl.gz").read_bytes())
    assert content[quarantine[0]["offset"] :].startswith(b"broken")


def test_shards_are_shuffled_balanced_and_cut_into_small_row_groups(tmp_path: Path) -> None:
    receipt = _write(_config(_corpus(tmp_path / "in")), tmp_path / "out")
    train = [shard for shard in receipt.shards if shard.split == "train"]
    assert len(train) >= 3
    assert max(s.bytes for s in train) - min(s.bytes for s in train) <= 2 * 400
    first = pq.ParquetFile(tmp_path / "out" / train[0].path)
    ids = first.read(["doc_id"])["doc_id"].to_pylist()
    assert {doc_id[0] for doc_id in ids} == {"0", "1"}
    assert ids != sorted(ids)
    for index in range(first.metadata.num_row_groups):
        assert sum(first.read_row_group(index, ["n_bytes"])["n_bytes"].to_pylist()) <= 5_000


def test_footer_says_what_the_file_holds_and_nothing_of_the_seed(tmp_path: Path) -> None:
    config = _config(_corpus(tmp_path / "in"), shard_bytes=2**27)
    receipt = _write(config, tmp_path / "out")
    for shard in receipt.shards:
        file = pq.ParquetFile(tmp_path / "out" / shard.path)
        footer = {k.decode(): v.decode() for k, v in file.metadata.metadata.items() if not k.startswith(b"ARROW")}
        digests = b"".join(hashlib.sha256(text).digest() for text in file.read(["text"])["text"].to_pylist())
        assert footer == {
            "schema_version": "2",
            "source": "corpus",
            "split": shard.split,
            "documents": str(shard.documents),
            "bytes": str(shard.bytes),
            "content_sha256": hashlib.sha256(digests).hexdigest(),
        }


@pytest.mark.parametrize(("limits", "kept"), [({"max_bytes": 100}, range(1, 101)), ({"min_bytes": 50}, range(50, 999))])
def test_documents_of_other_lengths_are_filtered_and_counted(tmp_path: Path, limits: Any, kept: range) -> None:
    plain = _write(_config(_corpus(tmp_path / "in")), tmp_path / "all")
    receipt = _write(_config(tmp_path / "in", **limits), tmp_path / "some")
    sizes = [n for s in receipt.shards for n in pq.read_table(tmp_path / "some" / s.path)["n_bytes"].to_pylist()]
    everything = [n for s in plain.shards for n in pq.read_table(tmp_path / "all" / s.path)["n_bytes"].to_pylist()]
    assert sorted(sizes) == sorted(size for size in everything if size in kept)
    assert receipt.counts.filtered == 2 + len(everything) - len(sizes)
    assert 0 < len(sizes) < len(everything)


def test_bytes_depend_on_seed_and_content_alone(tmp_path: Path) -> None:
    config = _config(_corpus(tmp_path / "in"))
    elsewhere = dataclasses.replace(config, input=(str(_corpus(tmp_path / "moved")),))
    _write(config, tmp_path / "a")
    _write(elsewhere, tmp_path / "b")
    _write(dataclasses.replace(config, seed=1), tmp_path / "c")
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert tree(tmp_path / "a") != tree(tmp_path / "c")


def test_a_group_with_a_receipt_is_not_read_again(tmp_path: Path) -> None:
    config = _config(_corpus(tmp_path / "in"))
    (group,) = plan_corpus(config).groups
    receipt = _write_one(group, config, tmp_path / "out")
    for file in (tmp_path / "in").iterdir():
        file.unlink()
    assert _write_one(group, config, tmp_path / "out") == receipt


def test_what_a_cut_off_run_left_is_adopted(tmp_path: Path) -> None:
    config = _config(_corpus(tmp_path / "in"))
    receipt = _write(config, tmp_path / "out")
    whole = tree(tmp_path / "out")
    (tmp_path / "out" / receipt_path(0)).unlink()
    (tmp_path / "out" / receipt.shards[0].path).unlink()
    kept = (tmp_path / "out" / receipt.shards[1].path).stat()
    assert _write(config, tmp_path / "out") == receipt
    assert tree(tmp_path / "out") == whole
    assert (tmp_path / "out" / receipt.shards[1].path).stat().st_mtime_ns == kept.st_mtime_ns


def test_a_foreign_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out" / "train").mkdir(parents=True)
    (tmp_path / "out" / "train" / "shard-00000-00000.parquet").write_bytes(b"mine")
    with pytest.raises(DataError, match=r"shard-00000-00000\.parquet exists and holds something else"):
        _write(_config(_corpus(tmp_path / "in")), tmp_path / "out")


def test_a_file_that_goes_away_ends_the_job(tmp_path: Path) -> None:
    config = _config(_corpus(tmp_path / "in"))
    (group,) = plan_corpus(config).groups
    (tmp_path / "in" / "1.jsonl.gz").unlink()
    with pytest.raises(DataError, match=r"cannot read .*1\.jsonl\.gz: No such file"):
        _write_one(group, config, tmp_path / "out")


def _stops_half_way(process: subprocess.Popen[bytes], output: Path, least: int, most: int) -> bool:
    """Whether it stops with as many shards written."""
    assert process.poll() is None, "finished before it could be killed"
    return stops_when(process.pid, lambda: least <= len(list(output.glob("train/*.parquet"))) <= most)


@pytest.mark.slow
def test_kill_9_leaves_no_torn_file_and_a_rerun_completes(tmp_path: Path) -> None:
    config = _config(_corpus(tmp_path / "in", documents=6000), shard_bytes=8_000, group_bytes=200_000)
    _write(config, tmp_path / "undisturbed")
    whole = tree(tmp_path / "undisturbed")
    out = tmp_path / "out"
    script = (
        "import sys; from tests.pipelines.shard.test_group import _config, _write; from pathlib import Path;"
        "_write(_config(Path(sys.argv[1]), shard_bytes=8_000, group_bytes=200_000), Path(sys.argv[2]))"
    )
    arguments = [sys.executable, "-c", script, str(tmp_path / "in"), str(out)]
    most = sum(path.startswith("train/") for path in whole) - 1
    for killed_at in (1, 20):
        process = subprocess.Popen(arguments, env={**os.environ, "PYTHONPATH": os.getcwd()})
        wait_for(functools.partial(_stops_half_way, process, out, killed_at, most), f"{killed_at} shards", seconds=60)
        process.kill()
        process.wait()
        found = tree(out)
        assert killed_at <= len(found) < len(whole)
        assert found.items() <= whole.items()
    _write(config, out)
    assert tree(out) == whole
