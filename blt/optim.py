"""Optimiser and learning-rate schedules.

In: a model, a step number. Out: AdamW over two groups of weights (decayed, not decayed) and the factor on its rate.
Source: the published configurations (AdamW, betas .9/.95, eps 1e-8, weight decay 0.1, clip 1.0).
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from blt.errors import ConfigError
from blt.hash_embedding import HashEmbedding
from blt.layers import RMSNorm


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    lr: float = 4e-4
    """Peak learning rate."""
    beta1: float = 0.9
    """Decay of the mean gradient."""
    beta2: float = 0.95
    """Decay of the mean squared gradient."""
    eps: float = 1e-8
    """Added to the root of the mean squared gradient."""
    weight_decay: float = 0.1
    """Decoupled weight decay."""
    decay_norms_and_embeddings: bool = True
    """Whether norms and embedding tables decay too, as in the reference."""
    clip_norm: float | None = 1.0
    """Largest gradient norm; null = no clipping."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After the warm-up: cosine to min_ratio; constant, then a linear decay over the last decay_fraction; constant."""
    warmup_steps: int = 2000
    """Steps of linear warm-up."""
    min_ratio: float = 0.0
    """Final learning rate over the peak."""
    decay_fraction: float = 0.1
    """Share of all steps in which wsd decays."""

    def __post_init__(self) -> None:
        for name in ("lr", "eps"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("beta1", "beta2", "min_ratio", "decay_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")
        if self.warmup_steps < 0 or self.weight_decay < 0:
            raise ConfigError("warmup_steps and weight_decay must not be negative")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ConfigError(f"clip_norm must be above 0 or null, got {self.clip_norm}")


def lr_factor(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Learning rate of update `step` (0-based) over the peak; that of the last update is min_ratio or near it."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    after = max(total_steps - config.warmup_steps, 1)
    done = min((step - config.warmup_steps + 1) / after, 1.0)
    if config.schedule == "cosine":
        return config.min_ratio + (1 - config.min_ratio) / 2 * (1 + math.cos(math.pi * done))
    decay_steps = max(config.decay_fraction * total_steps, 1)
    left = max(total_steps - step - 1, 0)
    return config.min_ratio + (1 - config.min_ratio) * min(left / decay_steps, 1.0)


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over a model's weights."""
    kept: list[nn.Parameter] = []
    if not config.decay_norms_and_embeddings:
        for module in model.modules():
            if isinstance(module, RMSNorm | nn.Embedding | HashEmbedding):
                kept.extend(module.parameters(recurse=False))
    kept_ids = {id(parameter) for parameter in kept}
    decayed = [parameter for parameter in model.parameters() if id(parameter) not in kept_ids]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The rate of every group from now on."""
    for group in optimizer.param_groups:
        group["lr"] = lr
