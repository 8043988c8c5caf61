"""Schedules as functions of the step, and AdamW over the right weights."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from blt.errors import ConfigError
from blt.hash_embedding import HashEmbedding
from blt.layers import RMSNorm
from blt.model import BLT
from blt.optim import OptimizerConfig, build_optimizer, lr_factor, set_lr
from tests.model_cases import blt_config

SCHEDULES = ["cosine", "wsd", "constant"]


def factors(config: OptimizerConfig, total_steps: int) -> list[float]:
    return [lr_factor(config, step, total_steps) for step in range(total_steps)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_is_linear_and_its_first_update_counts(schedule: str) -> None:
    config = OptimizerConfig(schedule=schedule, warmup_steps=4)
    assert factors(config, 100)[:4] == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_warm_up_the_first_update_is_near_the_peak(schedule: str) -> None:
    assert lr_factor(OptimizerConfig(schedule=schedule, warmup_steps=0), 0, 100) == pytest.approx(1.0, abs=1e-3)


def test_cosine() -> None:
    """Paper: cosine to 0. Half way after the warm-up the factor is half way between 1 and the least."""
    config = OptimizerConfig(warmup_steps=10, min_ratio=0.2)
    values = factors(config, 110)
    assert values[10 + 49] == pytest.approx(0.6)
    assert values[10 + 24] == pytest.approx(0.2 + 0.4 * (1 + math.cos(math.pi / 4)))
    assert values[-1] == pytest.approx(0.2)
    assert factors(replace(config, min_ratio=0.0), 110)[-1] == pytest.approx(0.0)


def test_wsd_stays_and_then_falls_in_a_line() -> None:
    config = OptimizerConfig(schedule="wsd", warmup_steps=5, decay_fraction=0.2, min_ratio=0.1)
    values = factors(config, 100)
    assert values[5:80] == [1.0] * 75
    assert values[80:] == pytest.approx([0.1 + 0.9 * left / 20 for left in range(19, -1, -1)])


def test_constant() -> None:
    assert set(factors(OptimizerConfig(schedule="constant", warmup_steps=3), 50)[3:]) == {1.0}


@given(
    schedule=st.sampled_from(SCHEDULES),
    warmup_steps=st.integers(0, 60),
    total_steps=st.integers(1, 120),
    min_ratio=st.floats(0, 1),
    decay_fraction=st.floats(0, 1),
)
def test_every_schedule_rises_then_falls(
    schedule: str, warmup_steps: int, total_steps: int, min_ratio: float, decay_fraction: float
) -> None:
    """Runs shorter than their warm-up included; beyond the last step nothing springs back."""
    config = OptimizerConfig(
        schedule=schedule, warmup_steps=warmup_steps, min_ratio=min_ratio, decay_fraction=decay_fraction
    )
    values = [lr_factor(config, step, total_steps) for step in range(max(total_steps, warmup_steps) + 7)]
    rising, falling = values[:warmup_steps], values[warmup_steps:]
    assert rising == sorted(rising)
    assert all(after <= before + 1e-12 for before, after in itertools.pairwise(falling))
    assert all(0 < value <= 1 for value in rising)
    assert all(min_ratio - 1e-12 <= value <= 1 for value in falling)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"lr": 0.0}, "lr must be above 0, got 0.0"),
        ({"lr": float("nan")}, "lr"),
        ({"eps": -1e-8}, "eps"),
        ({"beta1": 1.5}, "beta1"),
        ({"beta2": -0.1}, "beta2"),
        ({"min_ratio": 2.0}, "min_ratio"),
        ({"decay_fraction": -0.5}, "decay_fraction"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"latent_lr_scale": -0.1}, "latent_lr_scale must be a finite number, at least 0, got -0.1"),
        ({"latent_lr_scale": float("inf")}, "latent_lr_scale"),
        ({"clip_norm": 0.0}, "clip_norm must be above 0 or null, got 0.0"),
    ],
)
def test_values_that_make_no_sense_are_refused(changes: dict[str, float], names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        OptimizerConfig(**changes)  # type: ignore[arg-type]


def test_all_weights_decay_as_in_the_reference() -> None:
    model = BLT(blt_config())
    config = OptimizerConfig(lr=3e-3, beta1=0.8, beta2=0.97, eps=1e-6, weight_decay=0.05)
    (group,) = build_optimizer(model, config).param_groups
    assert {id(p) for p in group["params"]} == {id(p) for p in model.parameters()}
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (3e-3, (0.8, 0.97), 1e-6, 0.05)
    assert group["fused"]


def test_norms_and_embeddings_can_be_spared() -> None:
    model = BLT(blt_config())
    decayed, kept = build_optimizer(model, OptimizerConfig(decay_norms_and_embeddings=False)).param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    spared = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, RMSNorm | nn.Embedding | HashEmbedding)
        for parameter in module.parameters()
    }
    assert {id(parameter) for parameter in kept["params"]} == spared
    assert all(parameter.dim() == 2 for parameter in decayed["params"])
    together = [id(parameter) for group in (decayed, kept) for parameter in group["params"]]
    assert sorted(together) == sorted(id(parameter) for parameter in model.parameters())


@pytest.mark.parametrize("spared", [False, True])
def test_the_latent_transformer_has_a_rate_of_its_own(spared: bool) -> None:
    model = BLT(blt_config())
    config = OptimizerConfig(lr=0.5, latent_lr_scale=0.1, decay_norms_and_embeddings=not spared)
    optimizer = build_optimizer(model, config)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: rates[id(p)] for name, p in model.named_parameters()} == {
        name: 0.05 if name.startswith("latent.") else 0.5 for name, _ in model.named_parameters()
    }
    set_lr(optimizer, 2.0)
    assert sorted(group["lr"] for group in optimizer.param_groups) == ([0.2, 0.2, 2.0, 2.0] if spared else [0.2, 2.0])
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {decays[id(p)] for p in model.latent.blocks[0].attention_norm.parameters()} == {0.0 if spared else 0.1}


def test_a_rate_of_0_leaves_the_latent_transformer_as_it_is() -> None:
    model = BLT(blt_config())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = build_optimizer(model, OptimizerConfig(latent_lr_scale=0.0))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(before[name], tensor)}
    assert changed == {name for name in before if not name.startswith("latent.")}


def test_an_update_is_adamw() -> None:
    """Three steps against the formula (Loshchilov and Hutter 2019), float64; the rate changes in between."""
    model = nn.Linear(3, 2, bias=False).double()
    config = OptimizerConfig(lr=0.1, weight_decay=0.3)
    optimizer = build_optimizer(model, config)
    weight = model.weight.detach().clone()
    mean, square = torch.zeros_like(weight), torch.zeros_like(weight)
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 4):
        lr = 0.1 / step
        gradient = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.95 * square + 0.05 * gradient**2
        update = (mean / (1 - 0.9**step)) / ((square / (1 - 0.95**step)).sqrt() + 1e-8)
        weight = weight * (1 - lr * 0.3) - lr * update
        set_lr(optimizer, lr)
        model.weight.grad = gradient
        optimizer.step()
        torch.testing.assert_close(model.weight.detach(), weight, rtol=1e-12, atol=1e-12)


def test_set_lr_reaches_every_group() -> None:
    optimizer = build_optimizer(BLT(blt_config()), OptimizerConfig(decay_norms_and_embeddings=False))
    set_lr(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
