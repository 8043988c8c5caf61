"""The machine that a forecast assumes: what the user says of it in, its speed and memory out."""

from dataclasses import dataclass

import torch

from blt.device_peak import PUBLISHED, gemm_peak_flops, published_device
from blt.errors import ConfigError
from pipelines.train.config import TrainConfig

DEFAULT_GPU = "H100"
CPU = "cpu"


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What a forecast cannot know."""

    device: str | None = None
    """A worker's device: the name of a GPU, such as H100, or cpu, whose speed is measured here; null = H100 where
    gpus_per_worker is above 0, else cpu."""
    mfu: float = 0.4
    """Model FLOPs utilisation: share of the device's peak that training reaches."""
    device_flops: float | None = None
    """Peak FLOP/s of the device in matrix products; null = as published in bfloat16, or measured."""
    device_memory_bytes: float | None = None
    """Memory of the device; null = as published."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A worker's device."""

    name: str
    flops: float
    """FLOP/s in matrix products of the run's precision."""
    flops_source: str
    """Where that comes from: published, given or measured."""
    memory_bytes: float | None
    """None where nothing is known of it."""


def machine_of(assumed: Assumptions, config: TrainConfig) -> Machine:
    """The machine, ConfigError where a key has no sense or the speed is not known."""
    if not 0 < assumed.mfu <= 1:
        raise ConfigError(f'key "mfu" must lie above 0 and be at most 1, got {assumed.mfu}')
    for key in ("device_flops", "device_memory_bytes"):
        value = getattr(assumed, key)
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f'key "{key}" must be a finite number above 0, or null, got {value}')
    name = assumed.device or (DEFAULT_GPU if config.gpus_per_worker else CPU)
    published = published_device(name)
    memory = assumed.device_memory_bytes or (published.memory_bytes if published else None)
    flops, source = _flops(assumed, config, name)
    return Machine(name=published.name if published else name, flops=flops, flops_source=source, memory_bytes=memory)


def _flops(assumed: Assumptions, config: TrainConfig, name: str) -> tuple[float, str]:
    if assumed.device_flops is not None:
        return assumed.device_flops, "given"
    if name == CPU:
        return _cpu_flops(config), "measured here"
    published = published_device(name)
    if published is None:
        known = ", ".join(device.name for device in PUBLISHED)
        raise ConfigError(
            f'key "device": "{name}" is not known (accepted: {known}, {CPU}; or any other with device_flops and '
            "device_memory_bytes)"
        )
    if config.precision != "bfloat16":
        raise ConfigError(
            f'key "device": the published peak of {published.name} is that of bfloat16, but precision is '
            f"{config.precision}: say device_flops"
        )
    return published.bfloat16_flops, "published, bfloat16"


def _cpu_flops(config: TrainConfig) -> float:
    """Of this machine, with the threads of a worker."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, int(config.cpus_per_worker)))
    try:
        dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
        return gemm_peak_flops(torch.device("cpu"), dtype)
    finally:
        torch.set_num_threads(before)
