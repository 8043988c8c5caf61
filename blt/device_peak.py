"""The speed that a share of peak is measured against: a device in, its FLOP/s in matrix products out.

Published dense figures of known accelerators in bfloat16, as model FLOPs utilisation is given in the field; otherwise
what square products reach on the device itself, with the threads that this process uses.
"""

import time

import torch

_PUBLISHED_BFLOAT16 = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
}
"""By a part of the device's name, the longest names first where one holds another. Source: NVIDIA's data sheets."""


def device_peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of matrix products in `dtype`: published where known, measured otherwise."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for part, flops in _PUBLISHED_BFLOAT16.items():
            if part in name:
                return flops
    return gemm_peak_flops(device, dtype)


def gemm_peak_flops(device: torch.device, dtype: torch.dtype, size: int = 1024, seconds: float = 0.1) -> float:
    """FLOP/s of the fastest of the square products of `size` that fit into `seconds`, and of at least three."""
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
