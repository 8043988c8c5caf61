"""Deterministic mode through Ray Train: two runs of one configuration have the same losses and write the same bytes."""

import contextlib
from pathlib import Path

import pytest
import ray  # noqa: F401

# isort: split
import psutil  # bundled with Ray, which puts it on the path

# isort: split

from blt.checkpoint import load
from pipelines.train.metrics import Record
from pipelines.train.trainer import train
from tests.llama_checkpoint import write_llama
from tests.pipelines.train.test_survival import worker_processes
from tests.pipelines.train.tiny_run import (
    assert_follows,
    expected_curve,
    tiny_job,
    told_steps,
    write_tiny_patches,
)

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(400)]


@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize("survival", ["sharded", "replicated"])
def test_two_runs_are_the_same_bit_for_bit(tmp_path: Path, survival: str) -> None:
    """From a Llama: the curve is that of one process which has its blocks."""
    write_llama(tmp_path / "llama")
    data, found = write_tiny_patches(tmp_path / "patches"), []
    given = {"survival": survival, "deterministic": True, "init_latent_from": str(tmp_path / "llama")}
    environments: list[dict[str, str]] = []

    def look(record: Record) -> None:
        for process in worker_processes():
            with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
                environments.append(process.environ())

    for name in ("first", "second"):
        job = tiny_job(data, tmp_path / name, workers=2, steps=30, **given)
        train(job, look)
        losses = [(step.step, step.sequences, step.loss) for step in told_steps(job.output)]
        model = (tmp_path / name / "model" / "model.safetensors").read_bytes()
        found.append((losses, model, written(tmp_path / name)))
    assert_follows(job.output, expected_curve(job))
    assert load(f"{job.output}/model").provenance["init_latent_from"] == f"llama ({job.init_fingerprint})"
    assert len(found[0][0]) == 30
    assert len(found[0][2]) > 0
    assert found[0] == found[1]
    assert environments
    assert {environment.get("CUBLAS_WORKSPACE_CONFIG") for environment in environments} == {":4096:8"}


def written(output: Path) -> list[tuple[str, str, bytes]]:
    """The files of a run's checkpoints by step and kind; their names are drawn."""
    files = output.glob("checkpoints/*/step-*/*.safetensors")
    return sorted((path.parent.name, path.name.partition("-")[0], path.read_bytes()) for path in files)
