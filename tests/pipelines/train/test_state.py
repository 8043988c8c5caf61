"""The training state of a checkpoint: what comes back, and what is refused with the file's name."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from blt.errors import CheckpointError
from blt.model import BLT
from blt.optim import OptimizerConfig, build_optimizer
from pipelines.train.state import (
    OPTIMIZER_NAME,
    TRAINING_NAME,
    TrainingState,
    load_optimizer,
    read_training_state,
    save_training_state,
)
from tests.model_cases import blt_config, randomised

RUN = "a" * 64


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """One update from drawn gradients."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def new_run(seed: int = 0) -> tuple[BLT, torch.optim.Optimizer]:
    """A model and an optimiser of two groups, before the first update."""
    model = randomised(BLT(blt_config()), seed)
    return model, build_optimizer(model, OptimizerConfig(lr=1e-2, decay_norms_and_embeddings=False))


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, BLT, torch.optim.Optimizer]:
    """A checkpoint after two updates, and the model and optimiser that went into it."""
    model, optimizer = new_run()
    for seed in range(2):
        step(model, optimizer, seed)
    save_training_state(tmp_path, model, optimizer, TrainingState(steps_done=2, run=RUN))
    return tmp_path, model, optimizer


def test_a_resumed_optimizer_goes_on_to_the_same_bits(saved: tuple[Path, BLT, torch.optim.Optimizer]) -> None:
    directory, model, optimizer = saved
    resumed, fresh = new_run(seed=1)
    resumed.load_state_dict(model.state_dict())
    load_optimizer(directory, resumed, fresh)
    for seed in (7, 8):
        step(model, optimizer, seed)
        step(resumed, fresh, seed)
    assert all(torch.equal(ours, wanted) for ours, wanted in zip(resumed.parameters(), model.parameters(), strict=True))
    others, moments = zip(resumed.parameters(), model.parameters(), strict=True), optimizer.state
    assert all(torch.equal(fresh.state[p][name], moments[q][name]) for p, q in others for name in moments[q])


def test_without_its_moments_it_would_not(saved: tuple[Path, BLT, torch.optim.Optimizer]) -> None:
    _, model, optimizer = saved
    restarted, fresh = new_run(seed=1)
    restarted.load_state_dict(model.state_dict())
    step(model, optimizer, 7)
    step(restarted, fresh, 7)
    pairs = zip(restarted.parameters(), model.parameters(), strict=True)
    assert not any(torch.equal(ours, wanted) for ours, wanted in pairs)


def test_the_state_comes_back(saved: tuple[Path, BLT, torch.optim.Optimizer]) -> None:
    assert read_training_state(saved[0], RUN) == TrainingState(steps_done=2, run=RUN)


def test_the_files_hold_plain_data(saved: tuple[Path, BLT, torch.optim.Optimizer]) -> None:
    directory, model, _ = saved
    assert json.loads((directory / TRAINING_NAME).read_text()) == {"steps_done": 2, "run": RUN}
    names = {f"{m}.{name}" for name, _ in model.named_parameters() for m in ("exp_avg", "exp_avg_sq", "step")}
    assert set(load_file(directory / OPTIMIZER_NAME)) == names


def test_another_run_is_refused(saved: tuple[Path, BLT, torch.optim.Optimizer]) -> None:
    with pytest.raises(CheckpointError, match=r"training\.json: belongs to another run"):
        read_training_state(saved[0], "b" * 64)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"steps_done": 2, "ru',
        b'{"steps_done": 2}',
        b'{"steps_done": 2, "run": "a", "more": 1}',
        b'{"steps_done": "2", "run": "' + RUN.encode() + b'"}',
        b"[]",
        b"null",
        b"\xff\xfe",
    ],
)
def test_a_broken_state_is_refused(saved: tuple[Path, BLT, torch.optim.Optimizer], content: bytes) -> None:
    (saved[0] / TRAINING_NAME).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"training\.json: cannot be read"):
        read_training_state(saved[0], RUN)


def test_a_missing_state_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"training\.json: cannot be read"):
        read_training_state(tmp_path, RUN)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def with_tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def changed(path: Path) -> None:
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        change(tensors)
        save_file(tensors, path)

    return changed


NORM = "local_decoder.norm.weight"


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        pytest.param(Path.unlink, "cannot be read", id="missing"),
        pytest.param(emptied, "cannot be read", id="empty"),
        pytest.param(truncated, "cannot be read", id="truncated"),
        pytest.param(with_tensors(lambda t: t.pop(f"exp_avg.{NORM}")), NORM, id="a moment less"),
        pytest.param(with_tensors(lambda t: t.update({"exp_avg.head": torch.ones(1)})), "exp_avg.head", id="one more"),
        pytest.param(with_tensors(lambda t: t.update({f"exp_avg.{NORM}": torch.ones(3)})), NORM, id="mean's shape"),
        pytest.param(with_tensors(lambda t: t.update({f"exp_avg_sq.{NORM}": torch.ones(3)})), NORM, id="square's"),
    ],
)
def test_broken_moments_are_refused(
    saved: tuple[Path, BLT, torch.optim.Optimizer], damage: Callable[[Path], None], told: str
) -> None:
    directory = saved[0]
    damage(directory / OPTIMIZER_NAME)
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors: ") as refused:
        load_optimizer(directory, *new_run())
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)


def test_moments_of_another_shape_of_model_are_refused(saved: tuple[Path, BLT, torch.optim.Optimizer]) -> None:
    wider = BLT(blt_config(latent={"width": 32}))
    with pytest.raises(CheckpointError, match="has shape"):
        load_optimizer(saved[0], wider, build_optimizer(wider, OptimizerConfig()))
    deeper = BLT(blt_config(latent={"layers": 3}))
    with pytest.raises(CheckpointError, match=r"latent\.blocks\.2"):
        load_optimizer(saved[0], deeper, build_optimizer(deeper, OptimizerConfig()))
