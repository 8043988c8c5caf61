"""Types and kernels of a device for tensors on the meta device, which has neither: calls in, those of the device out.

On the meta device torch applies no autocast, and makes RMSNorm of several operations where CUDA has one kernel. So that
what is kept for a backward pass can be counted there, `AsOn` casts as autocast does on the device and has one kernel.
Source of the lists: ATen/autocast_mode.h for CUDA; CPU's is shorter, and what it casts to float32 is not used here.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

DeviceKind = Literal["cpu", "cuda"]
AnyValue = TypeVar("AnyValue")

NARROWED = frozenset({"linear", "matmul", "mm", "addmm", "bmm", "baddbmm"})
"""Run in autocast's type, on both."""
WIDENED_ON_CUDA = frozenset({"exp", "log", "pow", "rsqrt", "reciprocal", "rms_norm"})
"""Run in float32."""
SUMMED_IN_FLOAT32_ON_CUDA = frozenset({"sum", "prod", "cumsum", "softmax", "log_softmax"})
"""Give float32 unless a type is named."""


class AsOn(TorchFunctionMode):
    """While it is on, tensors on the meta device have the types and kernels that they would have on `device`."""

    def __init__(self, device: DeviceKind, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self._on_cuda, self._autocast = device == "cuda", autocast

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name, given, named = getattr(func, "__name__", ""), tuple(args), dict(kwargs or {})
        if self._autocast is not None:
            if name in NARROWED:
                given, named = _cast((given, named), self._autocast)
            elif self._on_cuda and name in WIDENED_ON_CUDA:
                given, named = _cast((given, named), torch.float32)
            elif self._on_cuda and name in SUMMED_IN_FLOAT32_ON_CUDA and given[0].dtype == self._autocast:
                named.setdefault("dtype", torch.float32)
        if self._on_cuda and name == "rms_norm":
            return _OneKernelNorm.apply(given[0], named["weight"])  # type: ignore[no-untyped-call]
        return func(*given, **named)


def _cast(values: AnyValue, dtype: torch.dtype) -> AnyValue:
    """The values with floating-point tensors in `dtype`; autocast leaves float64 alone."""

    def cast(value: Any) -> Any:
        is_cast = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
        return value.to(dtype) if is_cast else value

    cast_values: AnyValue = tree_map(cast, values)
    return cast_values


class _OneKernelNorm(torch.autograd.Function):
    """The shapes of CUDA's RMSNorm: it keeps its input, its weight and one float32 of each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)
