"""The training state of a checkpoint: optimiser moments, step and what the run was made of. No pickle.

DIR/model/                  what `blt.load` or `blt.load_entropy_model` reads
DIR/optimizer.safetensors   AdamW's moments under the weights' names
DIR/training.json           step, run and data fingerprints; written last
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from blt.errors import CheckpointError

MODEL_NAME = "model"
OPTIMIZER_NAME = "optimizer.safetensors"
TRAINING_NAME = "training.json"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """Where a run stands."""

    steps_done: int
    run: str
    """Fingerprint of configuration, model shape and data: a checkpoint goes on in the run that made it alone."""


def save_training_state(
    directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: TrainingState
) -> None:
    """Write optimiser and state beside the model that is already in `directory`."""
    tensors = {
        f"{moment}.{name}": optimizer.state[parameter][moment].detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        for moment in MOMENTS
    }
    save_file(tensors, directory / OPTIMIZER_NAME)
    (directory / TRAINING_NAME).write_text(json.dumps(asdict(state)), encoding="utf-8")


def read_training_state(directory: Path, run: str) -> TrainingState:
    """The state of a checkpoint. CheckpointError if it is broken or another run's."""
    path = directory / TRAINING_NAME
    try:
        state = TrainingState(**json.loads(path.read_text(encoding="utf-8")))
        if type(state.steps_done) is not int:
            raise TypeError(f"steps_done is {state.steps_done!r}")
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    if state.run != run:
        raise CheckpointError(f"{path}: belongs to another run (configuration, model or data differ)")
    return state


def load_optimizer(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put the stored moments into a fresh optimiser. CheckpointError if the file is broken or does not fit."""
    path = directory / OPTIMIZER_NAME
    try:
        tensors = load_file(path)
        for name, parameter in model.named_parameters():
            moments = {moment: tensors.pop(f"{moment}.{name}") for moment in MOMENTS}
            for moment in ("exp_avg", "exp_avg_sq"):
                if moments[moment].shape != parameter.shape:
                    raise CheckpointError(f"{path}: {moment}.{name} has shape {list(moments[moment].shape)}")
            optimizer.state[parameter] = {moment: value.to(parameter.device) for moment, value in moments.items()}
    except (OSError, SafetensorError, KeyError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    if tensors:
        raise CheckpointError(f"{path}: holds tensors of another model, such as {next(iter(tensors))}")
