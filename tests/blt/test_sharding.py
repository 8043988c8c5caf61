"""A sharded model makes the steps of the whole one: loss, gradient norm and weights, at any number of ranks."""

from typing import Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from blt.entropy_model import EntropyModel, EntropyModelConfig
from blt.hash_embedding import HashEmbedding
from blt.model import BLT
from blt.optim import OptimizerConfig, build_optimizer
from blt.parallel import FlatGradients
from blt.recomputation import Recomputation, recompute_blocks
from blt.sharding import ShardedGradients, load_full, sharded
from blt.step import StepCounts, accumulate, train_step, update
from blt.training_tensors import training_tensors
from tests.blt.test_step import padding_batch, rows_of
from tests.gloo import run_ranks
from tests.model_cases import blt_config, randomised, transformer_config

Kind = Literal["blt", "entropy_model"]
OPTIMIZER = OptimizerConfig(lr=1e-2)
STEPS = 3
Trace = tuple[list[float], list[float], dict[str, Tensor]]
"""Nats and gradient norms of the steps, and the weights after them."""


def build(kind: Kind) -> nn.Module:
    return BLT(blt_config()) if kind == "blt" else EntropyModel(EntropyModelConfig(transformer=transformer_config()))


def whole_steps(kind: Kind) -> Trace:
    """By one process, without sharding."""
    model = randomised(build(kind))
    optimizer, gradients = build_optimizer(model, OPTIMIZER), FlatGradients(model.parameters(), lambda tensor: tensor)
    nats, norms = [], []
    for step in range(STEPS):
        gradients.zero()
        counts = StepCounts(torch.device("cpu"))
        accumulate(model, counts, rows_of(kind, step))
        norms.append(update(optimizer, gradients, counts.totals(), clip_norm=0.5))
        nats.append(counts.totals().nats)
    return nats, norms, {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def sharded_steps(kind: Kind, recomputation: Recomputation) -> Trace:
    """On this rank of a group; where rows run out, the last micro-batches are empty."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world_size,))
    model = sharded(lambda: build(kind), mesh, recomputation=recomputation)
    load_full(model, randomised(build(kind)).state_dict() if rank == 0 else None)
    optimizer, gradients = build_optimizer(model, OPTIMIZER), ShardedGradients(model, mesh)
    nats, norms = [], []
    for step in range(STEPS):
        rows = rows_of(kind, step)
        own = rows[rank::world_size]
        own += [padding_batch(kind)] * (-(-len(rows) // world_size) - len(own))
        result = train_step(model, optimizer, gradients, own, clip_norm=0.5)
        nats.append(result.tally.nats)
        norms.append(result.grad_norm)
    names = {name.removeprefix("model.") for name in training_tensors(model, optimizer) if name.startswith("model.")}
    weights = {name: _whole(parameter) for name, parameter in model.named_parameters()}
    assert names == weights.keys()
    return nats, norms, weights


def _whole(parameter: Tensor) -> Tensor:
    assert isinstance(parameter, DTensor)
    return parameter.full_tensor().detach()


@pytest.mark.parametrize(
    ("kind", "world_size"),
    [
        ("blt", 2),
        pytest.param("blt", 1, marks=pytest.mark.slow),
        pytest.param("blt", 3, marks=pytest.mark.slow),
        pytest.param("entropy_model", 2, marks=pytest.mark.slow),
    ],
)
def test_steps_are_those_of_the_whole_model(kind: Kind, world_size: int) -> None:
    nats, norms, weights = whole_steps(kind)
    for found_nats, found_norms, found_weights in run_ranks(world_size, sharded_steps, kind, "none"):
        assert found_nats == pytest.approx(nats, rel=1e-5)
        assert found_norms == pytest.approx(norms, rel=1e-5)
        assert found_weights.keys() == weights.keys()
        for name, weight in weights.items():
            torch.testing.assert_close(found_weights[name], weight, atol=1e-4, rtol=0, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("recomputation", ["selective", "full"])
def test_recomputation_changes_nothing_when_sharded(recomputation: Recomputation) -> None:
    assert run_ranks(2, sharded_steps, "blt", recomputation)[0][0] == pytest.approx(whole_steps("blt")[0], rel=1e-5)


def loss_in_bfloat16() -> tuple[list[float], torch.dtype]:
    """Nats of some steps, and the type of the weights."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = sharded(lambda: build("blt"), mesh, precision="bfloat16")
    load_full(model, randomised(build("blt")).state_dict() if dist.get_rank() == 0 else None)
    optimizer, gradients = build_optimizer(model, OPTIMIZER), ShardedGradients(model, mesh)
    nats = []
    for step in range(STEPS):
        own = rows_of("blt", step)[dist.get_rank() :: dist.get_world_size()]
        own += [padding_batch("blt")] * (3 - len(own))
        result = train_step(model, optimizer, gradients, own, clip_norm=0.5, autocast=torch.bfloat16)
        nats.append(result.tally.nats)
    return nats, next(model.parameters()).dtype


@pytest.mark.slow
def test_bfloat16_keeps_float32_weights_and_stays_near_float32() -> None:
    nats, dtype = run_ranks(2, loss_in_bfloat16)[0]
    assert dtype == torch.float32
    assert nats == pytest.approx(whole_steps("blt")[0], rel=1e-2)
    assert nats != pytest.approx(whole_steps("blt")[0], rel=1e-6)


def table_gradient(width: int) -> Tensor:
    """Of a column-split table whose ranks look up as many bytes as their number says, each weighed by its place."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = sharded(lambda: _table(width), mesh)
    load_full(model, _filled(width).state_dict() if dist.get_rank() == 0 else None)
    _loss(model, dist.get_rank()).backward()
    gradient = model.hash_embedding.table.grad
    assert isinstance(gradient, DTensor)
    return gradient.full_tensor()


class _Tables(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.hash_embedding = HashEmbedding(group_sizes=(2, 3), functions=1, table_size=11, width=width)

    def forward(self, byte_ids_BT: Tensor) -> Tensor:
        out: Tensor = self.hash_embedding(byte_ids_BT)
        return out


def _table(width: int) -> _Tables:
    return _Tables(width)


def _filled(width: int) -> _Tables:
    torch.manual_seed(0)
    return _Tables(width)


def _loss(model: nn.Module, rank: int) -> Tensor:
    ids = torch.arange(5 + 3 * rank).remainder(7)[None] + 4
    out: Tensor = model(ids)
    return (out.square() * torch.arange(1, out.numel() + 1).view_as(out)).sum()


@pytest.mark.parametrize("width", [5, pytest.param(4, marks=pytest.mark.slow)])
def test_the_gradient_of_split_tables_is_that_of_whole_ones(width: int) -> None:
    """Over 3 ranks, which divide neither width, with other numbers of bytes on each."""
    whole = _filled(width)
    for rank in range(3):
        _loss(whole, rank).backward()
    assert whole.hash_embedding.table.grad is not None
    for found in run_ranks(3, table_gradient, width):
        torch.testing.assert_close(found, whole.hash_embedding.table.grad)


def test_recomputation_keeps_gradients_and_saves_memory() -> None:
    kept, gradients = [], []
    kinds: tuple[Recomputation, ...] = ("none", "selective", "full")
    for kind in kinds:
        model = randomised(build("blt"))
        recompute_blocks(model, kind)
        storages: dict[int, int] = {}

        def pack(tensor: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        counts = StepCounts(torch.device("cpu"))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            accumulate(model, counts, rows_of("blt", 0)[:1])
        kept.append(sum(storages.values()))
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert kept[0] > kept[2]
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0])
