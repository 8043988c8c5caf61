"""Subjects measured turn by turn: what to run in; seconds of each run, the machine's speed then and memory out.

Every repeat runs each subject once, so that a machine that slows down slows all of them, and takes the speed of square
matrix products just before each run, so that a share of peak is one of that moment.
"""

import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from blt.device_peak import gemm_peak_flops
from jobs.bench.circumstances import summary

PEAK_SECONDS = 0.3
"""For which the speed of matrix products is taken."""
_CLEAR_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_RESET_PEAK = "5"
"""Written to clear_refs, it makes Linux count the largest resident memory anew (man 5 proc)."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One run of one subject."""

    seconds: float
    cpu_seconds: float
    """Of this process, all threads."""
    gemm_flops: float
    """FLOP/s of square products, just before."""
    peak_memory_bytes: int
    """Largest resident memory during the run; on CUDA, largest allocation. Where the system cannot count it anew, that
    of the process so far."""


def take_turns(
    subjects: Mapping[str, Callable[[], object]], repeats: int, device: torch.device, dtype: torch.dtype
) -> dict[str, list[Turn]]:
    """`repeats` runs of each subject, after one that is not measured."""
    turns: dict[str, list[Turn]] = {name: [] for name in subjects}
    for subject in subjects.values():
        subject()
    for _ in range(repeats):
        for name, subject in subjects.items():
            turns[name].append(_run(subject, device, dtype))
    return turns


def _run(subject: Callable[[], object], device: torch.device, dtype: torch.dtype) -> Turn:
    peak = gemm_peak_flops(device, dtype, seconds=PEAK_SECONDS)
    reset_peak_memory(device)
    began, cpu_began = time.perf_counter(), time.process_time()
    subject()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return Turn(
        seconds=time.perf_counter() - began,
        cpu_seconds=time.process_time() - cpu_began,
        gemm_flops=peak,
        peak_memory_bytes=peak_memory_bytes(device),
    )


def speed_figures(turns: Sequence[Turn], num_bytes: int, flops_per_byte: float) -> dict[str, Any]:
    """Bytes per second, share of the peak of matrix products (useful operations alone), and memory."""
    return {
        "bytes_per_second": summary([num_bytes / turn.seconds for turn in turns]),
        "bytes_per_cpu_second": summary([num_bytes / turn.cpu_seconds for turn in turns]),
        "share_of_peak": summary([num_bytes * flops_per_byte / turn.seconds / turn.gemm_flops for turn in turns]),
        "peak_memory_bytes": max(turn.peak_memory_bytes for turn in turns),
    }


def ratios(turns: Sequence[Turn], others: Sequence[Turn], bytes_ratio: float = 1.0) -> dict[str, Any]:
    """How many times faster than others' of the same repeats; `bytes_ratio`: bytes of a turn over bytes of theirs."""
    return summary([other.seconds / turn.seconds * bytes_ratio for turn, other in zip(turns, others, strict=True)])


def reset_peak_memory(device: torch.device) -> None:
    """Count the largest memory anew, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _CLEAR_REFS.exists():
        _CLEAR_REFS.write_text(_RESET_PEAK)


def peak_memory_bytes(device: torch.device) -> int:
    """As of a `Turn`, since it was last counted anew."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if not _STATUS.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
