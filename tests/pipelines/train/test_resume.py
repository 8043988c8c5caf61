"""A run that goes on from a checkpoint ends with the bits of one that was never interrupted: weights, moments, steps of
the schedule and the losses on the way. Runs through Ray Train are in test_survival.py and test_repeatability.py.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from blt.entropy_model import EntropyModelConfig
from blt.optim import build_optimizer, lr_factor, set_lr
from blt.parallel import FlatGradients, Gradients
from blt.step import train_step
from blt.training_tensors import training_tensors
from pipelines.manifest import Split, read_manifest
from pipelines.train.checkpoints import Checkpoints
from pipelines.train.feed import Feed, FeedConfig
from pipelines.train.index import Index, index_shard
from pipelines.train.job import Model, TrainJob
from pipelines.train.sharded import ShardedTraining
from pipelines.train.survival import Cluster, Place, Share
from tests.gloo import run_ranks
from tests.model_cases import transformer_config
from tests.pipelines.train.tiny_run import CONFIG, model_config, write_tiny_patches

SAVED, STEPS = 4, 9
"""The step of the checkpoint, and the last one; the schedule's warm-up ends between them."""
ALONE = Share(0, 1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny_patches(tmp_path_factory.mktemp("resume") / "patches")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two wait for each other longer than products of this size take."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def job(data: str, output: Path | str, kind: str) -> TrainJob:
    """The tiny run, its index made in this process."""
    is_blt = kind == "blt"
    return TrainJob(
        kind="blt" if is_blt else "entropy_model",
        config=CONFIG,
        model=model_config() if is_blt else EntropyModelConfig(transformer=transformer_config()),
        data=data,
        train_index=index(data, "train", CONFIG.sequence_patches if is_blt else None),
        valid_index=index(data, "valid", CONFIG.sequence_patches if is_blt else None),
        output=str(output),
    )


def index(data: str, split: Split, sequence_patches: int | None) -> Index:
    manifest, length = read_manifest(data), CONFIG.sequence_bytes
    groups = [
        group for s in manifest.split(split) for group in index_shard(data, s.path, s.source, sequence_patches, length)
    ]
    return Index(
        dataset=manifest.fingerprint,
        split=split,
        sequence_patches=sequence_patches,
        sequence_bytes=length,
        row_groups=tuple(groups),
    )


def go_on(
    job: TrainJob,
    model: Model,
    optimizer: torch.optim.Optimizer,
    gradients: Gradients,
    steps: range,
    share: Share = ALONE,
) -> list[float]:
    """The updates of `steps`; nats of each."""
    nats, recipe = [], job.config.optimizer
    with Feed(job.data, job.train_index, FeedConfig.of(job.config), job.config.steps) as feed:
        for step in steps:
            set_lr(optimizer, recipe.lr * lr_factor(recipe, step, job.config.steps))
            batches = feed.step(step, *share).batches
            nats.append(train_step(model, optimizer, gradients, batches, clip_norm=recipe.clip_norm).tally.nats)
    return nats


@pytest.mark.parametrize(("kind", "latent_lr_scale"), [("blt", None), ("blt", 0.1), ("entropy_model", None)])
def test_one_process_goes_on_bit_for_bit(data: str, tmp_path: Path, kind: str, latent_lr_scale: float | None) -> None:
    run = job(data, tmp_path, kind)
    optimizer_config = replace(run.config.optimizer, latent_lr_scale=latent_lr_scale)
    run = replace(run, config=replace(run.config, optimizer=optimizer_config))
    checkpoints = Checkpoints(run.output, run.run, keep=2)
    torch.manual_seed(run.config.seed)
    model = run.build()
    optimizer, gradients = build_optimizer(model, run.config.optimizer), FlatGradients(model.parameters())
    tensors = training_tensors(model, optimizer)
    go_on(run, model, optimizer, gradients, range(SAVED))
    checkpoints.save(SAVED, tensors, Place(steps_done=SAVED).state(), wait=False)  # goes on while it is written
    nats = go_on(run, model, optimizer, gradients, range(SAVED, STEPS))
    checkpoints.wait()

    resumed = run.without_weights()
    optimizer, gradients = build_optimizer(resumed, run.config.optimizer), FlatGradients(resumed.parameters())
    found, place = training_tensors(resumed, optimizer), Place()
    loaded = checkpoints.load_newest(found)
    assert loaded is not None
    place.take(loaded.state)
    assert go_on(run, resumed, optimizer, gradients, range(place.steps_done, STEPS)) == nats
    assert len(nats) == STEPS - SAVED
    assert_same_bits(found, tensors)
    assert {float(tensor) for name, tensor in found.items() if name.startswith("step.")} == {STEPS}


def assert_same_bits(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    differing = [name for name in wanted if not torch.equal(found[name], wanted[name])]
    assert differing == []


def resumed_on_ranks(data: str, output: str) -> tuple[list[list[float]], list[str]]:
    """On this rank of a group: nats from the checkpoint on, without an interruption and with one; the tensors whose
    part on this rank differs."""
    run, nobody = job(data, output, "blt"), SimpleNamespace(remote=lambda *told: None)
    cluster = Cluster(SimpleNamespace(saved=nobody, event=nobody), "")
    nats, ends = [], []
    for _ in range(2):  # the second finds the checkpoint of the first
        place = Place()
        training: Any = ShardedTraining(place, run, torch.device("cpu"), cluster)
        share, parts = training.begin(), (training.model, training.optimizer, training.gradients)
        if place.steps_done == 0:
            go_on(run, *parts, range(SAVED), share)
            place.steps_done = SAVED
            training.save(share, wait=True)
        nats.append(go_on(run, *parts, range(place.steps_done, STEPS), share))
        ends.append(training._tensors)
    own = [{name: getattr(tensor, "_local_tensor", tensor) for name, tensor in tensors.items()} for tensors in ends]
    return nats, [name for name in own[0] if not torch.equal(own[0][name], own[1][name])]


@pytest.mark.slow
def test_sharded_ranks_go_on_bit_for_bit(data: str, tmp_path: Path) -> None:
    for nats, differing in run_ranks(2, resumed_on_ranks, data, str(tmp_path)):
        assert nats[0] == nats[1]
        assert len(nats[0]) == STEPS - SAVED
        assert differing == []
