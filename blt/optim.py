"""Optimiser and learning-rate schedules.

In: a model, a step number. Out: AdamW over groups of weights (decayed or not, of the latent transformer or the rest)
and the factor on its rate.
Source: the published configurations (AdamW, betas .9/.95, eps 1e-8, weight decay 0.1, clip 1.0).
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from blt.errors import ConfigError
from blt.hash_embedding import HashEmbedding
from blt.latent_transformer import LatentTransformer
from blt.layers import RMSNorm


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    lr: float = 4e-4
    """Peak learning rate."""
    latent_lr_scale: float | None = None
    """Learning rate of the latent transformer, its input projection included, over that of the rest; null = 0.1 where
    init_latent_from gives it its weights, as in the paper, else 1."""
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
        if self.latent_lr_scale is not None and not 0 <= self.latent_lr_scale < float("inf"):
            raise ConfigError(f"latent_lr_scale must be a finite number, at least 0, got {self.latent_lr_scale}")
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
    """AdamW over a model's weights, for `set_lr`."""
    kept, latent = set[int](), set[int]()
    for module in model.modules():
        if isinstance(module, LatentTransformer):
            latent.update(map(id, module.parameters()))
        if isinstance(module, RMSNorm | nn.Embedding | HashEmbedding) and not config.decay_norms_and_embeddings:
            kept.update(map(id, module.parameters(recurse=False)))
    scale = 1.0 if config.latent_lr_scale is None else config.latent_lr_scale
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        decay = 0.0 if id(parameter) in kept else config.weight_decay
        groups.setdefault((decay, scale if id(parameter) in latent else 1.0), []).append(parameter)
    optimizer = torch.optim.AdamW(
        [
            {"params": of, "weight_decay": decay, "lr_scale": factor}
            for (decay, factor), of in sorted(groups.items(), reverse=True)
        ],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )
    set_lr(optimizer, config.lr)
    return optimizer


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The rate of every group of `build_optimizer` from now on: `lr` times the group's own scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
