"""Summing over ranks: one flat buffer of every gradient, and the step's nats and counts beside it.

Works in a process group of any backend, and without one. The counts are float64, since float32 loses whole bytes above
2 ** 24; so a step is one large all-reduce and one of three numbers.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn


class FlatGradients:
    """Gradients of `parameters` as views of one buffer, [number of elements], plus the step's counts."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        first = self.parameters[0]
        self.device = first.device
        self.buffer = torch.zeros(sum(p.numel() for p in self.parameters), device=first.device, dtype=first.dtype)
        self.counts = torch.zeros(3, device=first.device, dtype=torch.float64)
        start = 0
        for parameter in self.parameters:
            parameter.grad = self.buffer[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()

    def zero(self) -> None:
        self.buffer.zero_()
        self.counts.zero_()

    def count(self, nats: Tensor, targets: Tensor, num_bytes: Tensor) -> None:
        """Add a micro-batch's summed nats, targets and byte targets."""
        self.counts += torch.stack((nats.double(), targets.double(), num_bytes.double()))

    def sum_over_ranks(self) -> tuple[float, float, float]:
        """Sum gradients and counts over all ranks; nats, targets and byte targets of the global batch."""
        sum_over_ranks(self.buffer)
        sum_over_ranks(self.counts)
        nats, targets, num_bytes = self.counts.tolist()
        return nats, targets, num_bytes

    def divide_and_clip(self, divisor: float, clip_norm: float | None) -> float:
        """Divide the gradients, scale them so that their norm is at most clip_norm; the norm before scaling."""
        wide = torch.promote_types(self.buffer.dtype, torch.float32)
        norm = float(torch.linalg.vector_norm(self.buffer, dtype=wide)) / divisor
        scale = 1.0 / divisor
        if clip_norm is not None and norm > clip_norm:
            scale *= clip_norm / norm
        self.buffer.mul_(scale)
        return norm


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """In-place sum over the ranks of the default process group; without one, nothing."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor
