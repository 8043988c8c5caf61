"""What devices can do: the speed that a share of peak is measured against, and how much memory they have.

Published dense figures of known accelerators in bfloat16, as model FLOPs utilisation is given in the field; otherwise
what square products reach on the device itself, with the threads that this process uses.
"""

import re
import time
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class PublishedDevice:
    """What its data sheet says of an accelerator."""

    name: str
    bfloat16_flops: float
    """FLOP/s of dense matrix products."""
    memory_bytes: float
    """As printed, in units of 10 ** 9; what a process can use is near it."""


PUBLISHED = (
    PublishedDevice(name="B200", bfloat16_flops=2250e12, memory_bytes=180e9),
    PublishedDevice(name="H200", bfloat16_flops=989e12, memory_bytes=141e9),
    PublishedDevice(name="H100 PCIe", bfloat16_flops=756e12, memory_bytes=80e9),
    PublishedDevice(name="H100", bfloat16_flops=989e12, memory_bytes=80e9),
    PublishedDevice(name="A100-SXM4-40GB", bfloat16_flops=312e12, memory_bytes=40e9),
    PublishedDevice(name="A100-PCIE-40GB", bfloat16_flops=312e12, memory_bytes=40e9),
    PublishedDevice(name="A100", bfloat16_flops=312e12, memory_bytes=80e9),
    PublishedDevice(name="L40S", bfloat16_flops=362e12, memory_bytes=48e9),
    PublishedDevice(name="L4", bfloat16_flops=121e12, memory_bytes=24e9),
    PublishedDevice(name="A10G", bfloat16_flops=70e12, memory_bytes=24e9),
)
"""By words of the device's name (an L40 is no L4), the longest names first where one holds another. Source: NVIDIA's
data sheets."""


def published_device(name: str) -> PublishedDevice | None:
    """The known accelerator of a name such as H100 or "NVIDIA H100 80GB HBM3"; None for another."""
    return next((device for device in PUBLISHED if re.search(rf"\b{device.name}\b", name, re.IGNORECASE)), None)


def device_peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of matrix products in `dtype`: published where known, measured otherwise."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        published = published_device(torch.cuda.get_device_name(device))
        if published is not None:
            return published.bfloat16_flops
    return gemm_peak_flops(device, dtype)


def gemm_peak_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.1) -> float:
    """FLOP/s of the fastest of the square products that fit into `seconds`, and of at least three. Their size fills the
    device: 1024, or 8192 on CUDA."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    best, begun, rounds = float("inf"), time.perf_counter(), 0
    while rounds < 3 or time.perf_counter() - begun < seconds:
        started = time.perf_counter()
        torch.mm(a, b, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best, rounds = min(best, time.perf_counter() - started), rounds + 1
    return 2.0 * size**3 / best
