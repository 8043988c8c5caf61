"""Patching as the actor pool does it, measured: clocks and memory of the actors beside the commits that they return."""

import dataclasses
import os
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
import torch

from blt.device_peak import gemm_peak_flops
from blt.entropy_model import document_entropies
from blt.flops import entropy_flops_per_byte
from jobs.bench.turns import PEAK_SECONDS
from pipelines.actor_pool import run_units
from pipelines.manifest import read_manifest
from pipelines.model_files import local_model
from pipelines.patch.actor import PatchActor, PatchSources
from pipelines.patch.commit import Commit, claim
from pipelines.patch.dataset import plan_dataset
from pipelines.patch.model import load_model
from pipelines.patch.plan import PatchConfig
from pipelines.patch.rows import read_row_groups
from pipelines.storage import Storage


@dataclass(frozen=True, kw_only=True)
class UnitClock:
    """One shard as its actor saw it."""

    actor: int
    """Process id."""
    began: float
    """Seconds since the epoch; the model is loaded already."""
    ended: float
    """After the commit."""
    cpu_seconds: float
    """Of all threads of the process, between the two."""
    peak_rss_bytes: int
    """Of the process so far."""


@dataclass(frozen=True, kw_only=True)
class PoolRun:
    """What a pool of actors did."""

    commits: tuple[Commit, ...]
    units: tuple[UnitClock, ...]
    """In order of completion, like the commits."""

    @property
    def bytes_per_second(self) -> float:
        """Bytes of text over the time from an actor's first unit to the end of its last, waits between them included,
        summed over actors. Starts of processes and of models are left out.
        """
        spans: dict[int, list[tuple[UnitClock, int]]] = defaultdict(list)
        for unit, commit in zip(self.units, self.commits, strict=True):
            spans[unit.actor].append((unit, commit.bytes))
        return sum(
            sum(num_bytes for _, num_bytes in work)
            / (max(unit.ended for unit, _ in work) - min(unit.began for unit, _ in work))
            for work in spans.values()
        )

    @property
    def busy_bytes_per_second(self) -> float:
        """Bytes of text over the seconds in which actors were at work on a shard; of one actor."""
        return sum(commit.bytes for commit in self.commits) / sum(unit.ended - unit.began for unit in self.units)

    @property
    def bytes_per_cpu_second(self) -> float:
        """Bytes of text over the CPU-seconds of the actors: what other processes on the machine disturb least."""
        return sum(commit.bytes for commit in self.commits) / sum(unit.cpu_seconds for unit in self.units)


@dataclass(frozen=True, kw_only=True)
class BareRun:
    """What the entropy model did by itself."""

    bytes_per_second: float
    bytes_per_cpu_second: float
    share_of_peak: float
    """Of the speed of matrix products, measured just before; useful operations alone."""


class MeasuredPatchActor(PatchActor):
    """A patch actor that says when it was at work and how much memory it took."""

    def __call__(self, batch: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
        """The commits of a batch of units, and a clock for each."""
        self._load()
        commits, clocks = [], []
        for unit in batch["unit"]:
            began, cpu_began = time.time(), time.process_time()
            commits += super().__call__({"unit": [unit]})["commit"]
            clock = UnitClock(
                actor=os.getpid(),
                began=began,
                ended=time.time(),
                cpu_seconds=time.process_time() - cpu_began,
                peak_rss_bytes=_peak_rss_bytes(),
            )
            clocks.append(msgspec.json.encode(clock).decode())
        return {"commit": commits, "clock": clocks}


def run_pool(config: PatchConfig, documents: str, entropy_model: str | None, output: str, num_actors: int) -> PoolRun:
    """Patch `documents` into `output`, where nothing is yet, with `num_actors` actors. Ray must be initialised.

    The manifest is left to `patch_dataset`, which finds all shards done.
    """
    config = dataclasses.replace(config, min_actors=num_actors, max_actors=num_actors)
    plan = plan_dataset(config, read_manifest(documents), entropy_model)
    claim(Storage(output), plan)
    arguments: Mapping[str, object] = {
        "plan": dataclasses.replace(plan, units=()),
        "sources": PatchSources(documents=documents, output=output, entropy_model=entropy_model, reuse_entropies=None),
        "cpus_per_actor": config.cpus_per_actor,
    }
    items = [{"unit": msgspec.json.encode(unit).decode()} for unit in plan.units]
    rows = list(run_units(items, MeasuredPatchActor, arguments, config))
    return PoolRun(
        commits=tuple(msgspec.json.decode(row["commit"], type=Commit) for row in rows),
        units=tuple(msgspec.json.decode(row["clock"], type=UnitClock) for row in rows),
    )


def run_bare(config: PatchConfig, documents: str, entropy_model: str) -> BareRun:
    """The speed of `document_entropies` alone, in this process, on the documents that actors read, a row
    group at a time: on as many threads as an actor has, the model loaded and warm.
    """
    plan = plan_dataset(config, read_manifest(documents), entropy_model)
    patching = plan.patching
    assert patching.entropy_model is not None
    model = load_model(
        local_model(entropy_model), patching.entropy_model, patching.device, patching.dtype, config.cpus_per_actor
    )
    storage = Storage(documents)
    groups = [
        table["text"].to_pylist()
        for unit in plan.units
        for table in read_row_groups(storage, unit.path, plan.row_group_bytes)
    ]

    def infer(texts: Sequence[bytes]) -> None:
        document_entropies(model, texts, reset_on_newline=patching.reset_on_newline, row_bytes=plan.row_bytes)

    infer([b"x" * 4 * plan.row_bytes, *[b"x" * 100] * 9])
    peak = gemm_peak_flops(torch.device(patching.device), model.output.weight.dtype, PEAK_SECONDS)
    began, cpu_began = time.perf_counter(), time.process_time()
    for texts in groups:
        infer(texts)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    num_bytes = sum(unit.bytes for unit in plan.units)
    flops = sum(
        len(text) * entropy_flops_per_byte(model.config, len(text), "done")
        for texts in groups
        for text in texts
        if text
    )
    return BareRun(
        bytes_per_second=num_bytes / seconds,
        bytes_per_cpu_second=num_bytes / cpu_seconds,
        share_of_peak=flops / seconds / peak,
    )


def _peak_rss_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
