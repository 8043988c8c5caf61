"""Gradients of all workers, summed, and clipped by their global norm.

`FlatGradients`: every worker holds the whole model, and all its gradients are views of one buffer that is summed in one
call. `blt.sharding.ShardedGradients`: each holds a part, summed by FSDP. Either way gradients are sums over the targets
of the global batch until they are divided, once, so that nothing depends on how the batch was cut.
"""

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Gradients(Protocol):
    """The gradients of a step."""

    def zero(self) -> None:
        """Forget those of the step before."""
        ...

    def sum_over_ranks(self) -> None:
        """Sum over all workers, once every micro-batch has been through the backward pass."""
        ...

    def divide_and_clip(self, divisor: float, clip_norm: float | None) -> float:
        """Divide the gradients, scale them so that their norm is at most clip_norm; the norm before scaling."""
        ...


class FlatGradients:
    """Gradients of `parameters` as views of one buffer, [number of elements]; `reduce` sums a tensor in place."""

    def __init__(self, parameters: Iterable[nn.Parameter], reduce: Callable[[Tensor], object] | None = None) -> None:
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._reduce = sum_over_ranks if reduce is None else reduce
        first = self.parameters[0]
        self.buffer = torch.zeros(sum(p.numel() for p in self.parameters), device=first.device, dtype=first.dtype)
        start = 0
        for parameter in self.parameters:
            parameter.grad = self.buffer[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()

    def zero(self) -> None:
        self.buffer.zero_()

    def sum_over_ranks(self) -> None:
        self._reduce(self.buffer)

    def divide_and_clip(self, divisor: float, clip_norm: float | None) -> float:
        wide = torch.promote_types(self.buffer.dtype, torch.float32)
        norm = float(torch.linalg.vector_norm(self.buffer, dtype=wide)) / divisor
        self.buffer.mul_(clip_scale(norm, clip_norm) / divisor)
        return norm


def clip_scale(norm: float, clip_norm: float | None) -> float:
    """What gradients of this norm are multiplied with so that it is at most clip_norm."""
    return clip_norm / norm if clip_norm is not None and norm > clip_norm else 1.0


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """In-place sum over the ranks of the default process group; without one, nothing."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor
