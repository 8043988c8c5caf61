"""The forecast of a run: its configuration and its dataset's manifest in; parameters, FLOPs, memory, traffic and time
out. It starts no Ray, touches no GPU and reads no documents.

Parameters, state and traffic are exact; activations are counted on the meta device (`blt.activations`); sequences, and
with them bytes, epochs and time, are estimated. Left out of memory: what the device's runtime, its collectives and
gaps between allocations take, and what torch.compile changes.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from blt.entropy_model import EntropyModelConfig
from blt.memory_ledger import parameters_by_part
from blt.model import BLTConfig
from blt.traffic_ledger import TrafficLedger
from pipelines.train.checks import check_data, check_survival
from pipelines.train.config import TrainConfig
from pipelines.train.job import check_init_from, training_flops
from pipelines.train.machine import Assumptions, Machine, machine_of
from pipelines.train.order import micro_steps
from pipelines.train.run_sizes import WORLD_SIZES_UP_TO, MicroBatch, RunSizes, WorldSize
from pipelines.train.sequence_estimate import (
    Reading,
    SourceEstimate,
    estimate_reading,
    estimate_sequences,
    mean_patch_bytes,
)


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a run would take."""

    parameters: Mapping[str, int]
    """By part."""
    flops_per_byte: Mapping[str, float]
    """Of a training step, by part."""
    mean_patch_bytes: float
    sources: Mapping[str, SourceEstimate]
    """Of the training split."""
    reading: Reading
    steps: int
    num_sequences: int
    """Of all updates."""
    step_bytes: int
    """Document bytes of an update, estimated."""
    micro_steps: int
    """Micro-batches of a worker in an update."""
    machine: Machine
    mfu: float
    seconds: float
    """Of the updates, without evaluations and checkpoints."""
    usual: MicroBatch
    """Of sequences with patches of the mean size."""
    most: MicroBatch
    """Of sequences with as many bytes and as many patches as there may be: what memory has to do for."""
    world: WorldSize
    """As configured."""
    other_worlds: tuple[WorldSize, ...]
    """With 1, 2, 4, ... workers, those as configured among them."""
    smallest_fitting: int | None
    """Fewest workers on which the run fits, of those looked at."""
    traffic: TrafficLedger
    """Bytes that a worker sends in an update, with usual micro-batches."""

    @property
    def steps_per_epoch(self) -> float:
        """Updates that read as many sequences as there are, estimated."""
        return self.steps * sum(source.sequences for source in self.sources.values()) / self.num_sequences

    @property
    def bytes(self) -> int:
        """Document bytes of the run, estimated."""
        return self.steps * self.step_bytes


def forecast(
    config: TrainConfig,
    assumed: Assumptions,
    model: BLTConfig | EntropyModelConfig,
    data: str,
    entropy_model: str | None = None,
) -> Forecast:
    """The forecast of a run, after the checks that the run would make. ConfigError or DataError where one fails."""
    manifest = check_data(config, model, data, entropy_model)
    check_survival(config)
    if config.init_from is not None:
        check_init_from(config.init_from, model)
    machine, is_blt = machine_of(assumed, config), isinstance(model, BLTConfig)
    patches, patch_bytes = config.sequence_patches if is_blt else None, mean_patch_bytes(manifest.split("train"))
    sources = estimate_sequences(manifest, "train", patches, config.sequence_bytes)
    num_sequences = config.steps * config.global_batch
    reading = estimate_reading(sources, config.sources, num_sequences)
    sizes = RunSizes(config, model, patch_bytes)
    flops, step_bytes = training_flops(config, model, patch_bytes), round(config.global_batch * reading.sequence_bytes)
    run_flops = sum(flops.values()) * step_bytes * config.steps
    worlds = sizes.worlds(machine)
    fitting = [world.workers for world in worlds if world.fits]
    shown = _shown_workers(config)
    return Forecast(
        parameters=parameters_by_part(sizes.model),
        flops_per_byte=flops,
        mean_patch_bytes=patch_bytes,
        sources=sources,
        reading=reading,
        steps=config.steps,
        num_sequences=num_sequences,
        step_bytes=step_bytes,
        micro_steps=micro_steps(config.global_batch, config.micro_batch, config.workers),
        machine=machine,
        mfu=assumed.mfu,
        seconds=run_flops / (config.workers * machine.flops * assumed.mfu),
        usual=sizes.micro_batch(config.workers, sizes.usual),
        most=sizes.micro_batch(config.workers, sizes.most),
        world=worlds[config.workers - 1],
        other_worlds=tuple(world for world in worlds if world.workers in shown),
        smallest_fitting=min(fitting, default=None),
        traffic=sizes.traffic(),
    )


def _shown_workers(config: TrainConfig) -> set[int]:
    """Powers of two, the workers as configured, and the fewest that an elastic run goes on with."""
    last = WORLD_SIZES_UP_TO * config.workers
    powers = {2**power for power in range(last.bit_length()) if 2**power <= last}
    return powers | {config.workers, config.min_workers or config.workers}
