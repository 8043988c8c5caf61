"""Corpora of every format, and a shard job without Ray: the same tasks, one after the other in this process."""

import gzip
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.manifest import Manifest
from pipelines.shard import ShardConfig, corpus, dedup, plan_corpus, shard_corpus

FORMATS = ("jsonl", "jsonl.gz", "jsonl.zst", "parquet", "txt", "txt.gz", "txt.zst")


def zstd(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)  # type: ignore[no-any-return]


def write_texts(root: Path, name: str, suffix: str, texts: Sequence[str]) -> None:
    """`texts` below `root`, in one file, or for text formats in a file for each."""
    root.mkdir(parents=True, exist_ok=True)
    packed: Callable[[bytes], bytes] = {"gz": gzip_, "zst": zstd}.get(suffix.rpartition(".")[2], bytes)
    if suffix == "parquet":
        pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), root / f"{name}.parquet", row_group_size=2)
    elif suffix.startswith("jsonl"):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (root / f"{name}.{suffix}").write_bytes(packed(lines.encode()))
    else:
        for number, text in enumerate(texts):
            (root / f"{name}-{number:02d}.{suffix}").write_bytes(packed(text.encode()))


def gzip_(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)


def tree(root: Path) -> dict[str, str]:
    """Every file of a dataset with its hash; files being written are no part of it."""
    files = (file for file in root.rglob("*") if file.is_file() and "_temporary" not in file.parts)
    return {str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def rows_of(root: Path, manifest: Manifest) -> list[dict[str, Any]]:
    return [row for shard in manifest.shards for row in pq.read_table(root / shard.path).to_pylist()]


def shard(config: ShardConfig, output: Path) -> Manifest:
    return shard_corpus(plan_corpus(config), config, str(output), lambda num_bytes: None)


@contextmanager
def without_ray() -> Iterator[None]:
    """Tasks run in this process, last unit first; files are not synced, since no test that uses this cuts the power."""

    def serial(
        units: Sequence[bytes], work: Callable[[bytes], bytes], memory_bytes: int, stall_seconds: float
    ) -> Iterator[bytes]:
        return map(work, reversed(units))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "run_tasks", serial)
        patch.setattr(dedup, "run_tasks", serial)
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield
