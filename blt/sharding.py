"""A model spread over ranks: FSDP2 for the transformers, columns for the n-gram tables.

In: how to build the model, and a mesh of one dimension. Out: the model with each rank's part of every weight, to be
filled by `load_full` or from a checkpoint. Gradients are summed over ranks, never averaged: the step divides once by
its number of targets. The same code runs on CPU with gloo and on CUDA with NCCL.
"""

from collections.abc import Callable, Mapping
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from blt.column_embedding import ColumnHashEmbedding
from blt.hash_embedding import HashEmbedding
from blt.parallel import clip_scale
from blt.recomputation import Recomputation, blocks_of, prepare_blocks

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def sharded(
    build: Callable[[], AnyModule],
    mesh: DeviceMesh,
    *,
    precision: Literal["float32", "bfloat16"] = "float32",
    recomputation: Recomputation = "none",
    compile: bool = False,
) -> AnyModule:
    """The model of `build` with memory, not yet values, for this rank's part of its float32 weights.

    bfloat16: weights are gathered and products run in bfloat16 (under autocast); gradients are summed in float32.
    """
    with torch.device("meta"):
        model = build()
    prepare_blocks(model, recomputation, compile, mesh.device_type)
    tables = _split_tables(model, mesh)
    narrow = torch.bfloat16 if precision == "bfloat16" else None
    policy = MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=tables)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return model.to_empty(device=mesh.device_type)


def load_full(model: nn.Module, tensors: Mapping[str, Tensor] | None) -> None:
    """Fill a sharded model with rank 0's whole tensors by parameter name; the other ranks pass None. A collective."""
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=True)
    set_model_state_dict(model, dict(tensors or {}), options=options)


def _split_tables(model: nn.Module, mesh: DeviceMesh) -> set[nn.Parameter]:
    """Put column-split tables in place of whole ones; their parameters."""
    found: set[nn.Parameter] = set()
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, HashEmbedding):
                columns = ColumnHashEmbedding(module, mesh)
                setattr(parent, name, columns)
                found.add(columns.table)
    return found


class ShardedGradients:
    """The gradients of a sharded model: FSDP sums them during the backward pass."""

    def __init__(self, model: nn.Module, mesh: DeviceMesh) -> None:
        self._parameters, self._mesh = list(model.parameters()), mesh

    def zero(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def sum_over_ranks(self) -> None:
        """Done already."""

    def divide_and_clip(self, divisor: float, clip_norm: float | None) -> float:
        gradients = [_local(parameter.grad) for parameter in self._parameters if parameter.grad is not None]
        norms = torch.stack(torch._foreach_norm(gradients))
        squares = norms.double().square().sum()
        dist.all_reduce(squares, group=self._mesh.get_group())
        norm = float(squares.sqrt()) / divisor
        torch._foreach_mul_(gradients, clip_scale(norm, clip_norm) / divisor)
        return norm


def _local(tensor: Tensor) -> Tensor:
    """This rank's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
