"""Everything that a training checkpoint holds: a model and its optimiser in, tensors by name out, in place."""

from typing import Any

import torch
from torch import Tensor, nn


def training_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights and AdamW's moments, sharded or not; what is copied into them is in force.

    model.NAME, exp_avg.NAME, exp_avg_sq.NAME and step.NAME (one number); moments that are not there yet are zeros.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        state: dict[str, Any] = optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        tensors[f"model.{name}"] = parameter.detach()
        for moment in ("exp_avg", "exp_avg_sq", "step"):
            tensors[f"{moment}.{name}"] = state[moment]
    return tensors
