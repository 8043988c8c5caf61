"""What a run would do: shards and bytes left, bytes it would store, seconds it would take. Nothing is written."""

import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import torch

from pipelines.manifest import Manifest
from pipelines.patch.boundaries import patch_documents
from pipelines.patch.commit import is_claimed, read_commits
from pipelines.patch.model import load_model
from pipelines.patch.plan import PatchConfig, PatchPlan
from pipelines.patch.rows import read_row_groups
from pipelines.patch.stats import PatchStats, total_stats
from pipelines.storage import Storage

_TIMED_SECONDS = 2.0
_TIMED_BYTES = 2**16
"""Text of one timed batch; longer documents are cut to it."""
_BITMAP_RATIO = 0.10
"""Stored bytes of patch_starts per byte of text, as measured on mixed text at a mean patch of 4.5 bytes."""
_ENTROPIES_RATIO = 0.83
"""Stored bytes of entropies per byte of text, as measured there."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Of a whole dataset, and of what is left to do."""

    shards: int
    documents: int
    bytes: int
    """Bytes of document text."""
    shards_done: int
    bytes_done: int
    stored_bytes: int
    """Estimate for the whole dataset."""
    actors: int
    """That `seconds` assumes."""
    seconds: float | None
    """Estimate for what is left; None where nothing is done yet and the device of the model is not on this machine."""


def estimate(
    config: PatchConfig, plan: PatchPlan, documents: Manifest, root: str, entropy_model: str | None, output: str
) -> Estimate:
    """The estimate for `plan`, from the shards that are done, or else from the documents and the model itself.

    ConfigError if `output` was begun under another plan.
    """
    storage, source = Storage(output), Storage(root)
    commits = read_commits(storage, plan.hash).commits if is_claimed(storage, plan) else {}
    done = total_stats(commits.values())
    actors = _actors(config, len(plan.units) - len(commits))
    speed = _speed(config, plan, done, source, entropy_model)
    left_bytes = documents.bytes - done.bytes
    seconds = left_bytes / (speed * actors) if speed else None
    return Estimate(
        shards=len(plan.units),
        documents=documents.documents,
        bytes=documents.bytes,
        shards_done=len(commits),
        bytes_done=done.bytes,
        stored_bytes=_stored_bytes(plan, documents, done, source),
        actors=actors,
        seconds=0.0 if left_bytes == 0 else seconds,
    )


def _stored_bytes(plan: PatchPlan, documents: Manifest, done: PatchStats, source: Storage) -> int:
    """In the ratio of the finished shards; else the documents' files and what is added to them."""
    if done.bytes:
        return round(done.stored_bytes / done.bytes * documents.bytes)
    sizes = source.sizes()
    ratio = _BITMAP_RATIO + (_ENTROPIES_RATIO if plan.store_entropies else 0.0)
    return sum(sizes.get(shard.path, 0) for shard in documents.shards) + round(ratio * documents.bytes)


def _actors(config: PatchConfig, num_missing: int) -> int:
    """max_actors, or as many as this machine holds, at most one for each missing shard."""
    fits = (os.cpu_count() or 1) // config.cpus_per_actor
    if config.gpus_per_actor:
        fits = min(fits, math.floor(torch.cuda.device_count() / config.gpus_per_actor))
    return max(1, min(config.max_actors or max(fits, config.min_actors), num_missing))


def _speed(
    config: PatchConfig, plan: PatchPlan, done: PatchStats, source: Storage, entropy_model: str | None
) -> float | None:
    """Bytes per second of an actor: of the finished shards, else of the model over the first documents; None where
    neither can be had, and where stored entropies are reused.
    """
    patching = plan.patching
    if done.inferring_seconds:
        return done.bytes / done.seconds
    if config.reuse_entropies is not None or (patching.device == "cuda" and not torch.cuda.is_available()):
        return None
    model = None
    if patching.entropy_model is not None and entropy_model is not None:
        threads = config.cpus_per_actor
        model = load_model(entropy_model, patching.entropy_model, patching.device, patching.dtype, threads)
    num_bytes, began = 0, time.perf_counter()
    for batch in _first_documents(source, plan):
        num_bytes += sum(len(starts) - 1 for starts, _ in patch_documents(batch, model, plan))
        if time.perf_counter() - began > _TIMED_SECONDS:
            break
    return num_bytes / (time.perf_counter() - began) if num_bytes else None


def _first_documents(source: Storage, plan: PatchPlan) -> Iterator[pa.Table]:
    """Small batches of documents, long ones cut short."""
    for unit in plan.units:
        for table in read_row_groups(source, unit.path, _TIMED_BYTES):
            texts = [text.as_py()[:_TIMED_BYTES] for text in table["text"]]
            yield pa.table({"text": pa.array(texts, pa.large_binary()), "n_bytes": [len(text) for text in texts]})
