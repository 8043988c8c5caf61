"""Peak memory of an actor depends on the row group, not on how much a shard holds."""

import subprocess
import sys
from pathlib import Path

import pytest

from blt.patching import PatchRule
from pipelines.manifest import read_manifest
from pipelines.patch.actor import PatchActor, PatchSources
from pipelines.patch.plan import PatchConfig, make_plan
from tests.pipelines.patch.corpus import prose, write_documents

pytestmark = pytest.mark.slow

_MiB = 2**20
_ROW_GROUP_BYTES = 256 * 1024


def _peak_bytes(root: Path, num_mebibytes: int) -> int:
    """Of a process of its own that patches a shard of that size and then verifies and adopts its file."""
    page = [prose(seed, 16 * 1024) for seed in range(16)]
    shards = {"train/shard-00000.parquet": page * (4 * num_mebibytes)}
    write_documents(root / "documents", shards, row_group_bytes=_ROW_GROUP_BYTES)
    command = [sys.executable, "-c", f"from {__name__} import _patch_twice; _patch_twice({str(root)!r})"]
    completed = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(completed.stdout)


def _patch_twice(root: str) -> None:
    config = PatchConfig(rule=PatchRule(kind="space"), row_group_bytes=_ROW_GROUP_BYTES)
    plan = make_plan(config, read_manifest(f"{root}/documents"), None)
    output = f"{root}/patches"
    sources = PatchSources(documents=f"{root}/documents", output=output, entropy_model=None, reuse_entropies=None)
    actor = PatchActor(plan=plan, sources=sources, cpus_per_actor=1)
    actor.patch(plan.units[0])
    Path(output, "_commits/train-00000.json").unlink()
    actor.patch(plan.units[0])
    # Not getrusage, which counts what the parent held at the fork too.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    sys.stdout.write(str(int(status["VmHWM"].split()[0]) * 1024))


def test_a_shard_four_times_as_large_takes_no_more_memory(tmp_path: Path) -> None:
    small, large = (_peak_bytes(tmp_path / str(size), size) for size in (16, 64))
    assert large - small < 20 * _MiB, "allocators keep some pages, but the shards differ by 48 MiB"
