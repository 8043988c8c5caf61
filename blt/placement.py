"""Tensors by name into a fresh model: every parameter placed and nothing left over, or one error that names the fault.

In: how to build the model, its configuration, tensors by parameter name. Out: the model on a device in a dtype. The
model is built without storage first, so that no weight is initialised only to be overwritten, and tensors are copied
into memory of its own (a mapped file's tensors are not aligned, which changes the last bits of some products).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from blt.entropy_model import EntropyModel
from blt.model import BLT

Config = TypeVar("Config")
AnyModel = TypeVar("AnyModel", BLT, EntropyModel)

_TOLD = 8
"""Names listed per fault: a message stays one line."""


def place(
    build: Callable[[Config], AnyModel],
    config: Config,
    tensors: Mapping[str, Tensor],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> AnyModel:
    """The model of `config` with its parameters copied from `tensors`.

    Raises ValueError naming the tensors that are missing, unexpected, of another shape or not floating-point.
    """
    check_tensors(tensors, parameter_shapes(build, config))
    model = without_weights(build, config, device, dtype)
    with torch.no_grad():
        for name, parameter in model.state_dict().items():
            parameter.copy_(tensors[name])
    return model


def without_weights(
    build: Callable[[Config], AnyModel], config: Config, device: torch.device | str, dtype: torch.dtype
) -> AnyModel:
    """The model of `config` with memory for its parameters and whatever is in it: every one is to be written."""
    return _without_storage(build, config).to(dtype).to_empty(device=device)


def parameter_shapes(build: Callable[[Config], AnyModel], config: Config) -> dict[str, torch.Size]:
    """Shape of every parameter of a model of `config`, by name."""
    return {name: tensor.shape for name, tensor in _without_storage(build, config).state_dict().items()}


def check_tensors(tensors: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> None:
    """ValueError unless `tensors` has exactly the names and shapes of `shapes`, all of them floating-point."""
    shared = [name for name in shapes if name in tensors]
    other_shape = [
        f"{name} is {list(tensors[name].shape)} instead of {list(shapes[name])}"
        for name in shared
        if tuple(tensors[name].shape) != tuple(shapes[name])
    ]
    faults = {
        "missing": [name for name in shapes if name not in tensors],
        "unexpected": [name for name in tensors if name not in shapes],
        "of the wrong shape": other_shape,
        "not floating-point": [
            f"{name} is {tensors[name].dtype}" for name in shared if not tensors[name].is_floating_point()
        ],
    }
    told = [f"{len(names)} {fault}: {_listed(names)}" for fault, names in faults.items() if names]
    if told:
        raise ValueError(f"tensors do not fit the configuration; {'; '.join(told)}")


def _without_storage(build: Callable[[Config], AnyModel], config: Config) -> AnyModel:
    with torch.device("meta"):
        return build(config)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_TOLD]) + (f" and {len(names) - _TOLD} more" if len(names) > _TOLD else "")
