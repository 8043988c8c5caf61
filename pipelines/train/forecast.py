"""The forecast of a run: its configuration and its dataset's manifest in; parameters, FLOPs, memory, traffic and time
out. It starts no Ray, touches no GPU and reads no documents.

Parameters, state and the traffic of weights and gradients are exact; activations are counted on the meta device
(`blt.activations`); sequences, and with them bytes, epochs, time and the traffic of n-gram tables, are estimated. Left
out of memory: what the device's runtime, its collectives and gaps between allocations take, and what torch.compile
changes.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from blt.entropy_model import EntropyModelConfig
from blt.memory_ledger import parameters_by_part
from blt.model import BLTConfig
from blt.traffic_ledger import TrafficLedger
from pipelines.train.checks import check_data, check_survival
from pipelines.train.config import TrainConfig
from pipelines.train.job import training_flops
from pipelines.train.machine import Assumptions, Machine, machine_of
from pipelines.train.order import micro_steps
from pipelines.train.run_sizes import MicroBatch, RunSizes, WorldSize
from pipelines.train.sequence_estimate import (
    Reading,
    SourceEstimate,
    estimate_reading,
    estimate_sequences,
    mean_patch_bytes,
)
from pipelines.train.start import check_start


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a run would take."""

    config: TrainConfig
    parameters: Mapping[str, int]
    """By part."""
    flops_per_byte: Mapping[str, float]
    """Of a training step, by part."""
    mean_patch_bytes: float
    sources: Mapping[str, SourceEstimate]
    """Of the training split."""
    reading: Reading
    machine: Machine
    mfu: float
    usual: MicroBatch
    """Of sequences with patches of the mean size."""
    most: MicroBatch
    """Of sequences with as many bytes and as many patches as there may be: what memory has to do for."""
    worlds: tuple[WorldSize, ...]
    """With 1 worker, 2, 3, ..., those as configured among them."""
    traffic: TrafficLedger
    """Bytes that a worker sends in an update, with usual micro-batches."""

    @property
    def step_bytes(self) -> int:
        """Document bytes of an update, estimated."""
        return round(self.config.global_batch * self.reading.sequence_bytes)

    @property
    def bytes(self) -> int:
        """Document bytes of the run, estimated."""
        return self.config.steps * self.step_bytes

    @property
    def seconds(self) -> float:
        """Of the updates, without evaluations and checkpoints, at the assumed MFU; estimated."""
        speed = self.config.workers * self.machine.flops * self.mfu
        return self.bytes * sum(self.flops_per_byte.values()) / speed

    @property
    def steps_per_epoch(self) -> float:
        """Updates that read as many sequences as there are, estimated."""
        return sum(source.sequences for source in self.sources.values()) / self.config.global_batch

    @property
    def micro_steps(self) -> int:
        """Micro-batches of a worker in an update."""
        return micro_steps(self.config.global_batch, self.config.micro_batch, self.config.workers)

    @property
    def world(self) -> WorldSize:
        """As configured."""
        return self.worlds[self.config.workers - 1]

    @property
    def shown_worlds(self) -> list[WorldSize]:
        """With 1, 2, 4, ... workers, as many as configured, and the fewest that an elastic run goes on with."""
        configured = {self.config.workers, self.config.min_workers or self.config.workers}
        return [world for world in self.worlds if world.workers in configured or world.workers.bit_count() == 1]

    @property
    def smallest_fitting(self) -> int | None:
        """Fewest workers on which the run fits, of those looked at."""
        return min((world.workers for world in self.worlds if world.fits), default=None)


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
    check_start(config, model, manifest.patching)
    machine, patch_bytes = machine_of(assumed, config), mean_patch_bytes(manifest.split("train"))
    patches = config.sequence_patches if isinstance(model, BLTConfig) else None
    sources = estimate_sequences(manifest, "train", patches, config.sequence_bytes)
    sizes = RunSizes(config, model, patch_bytes)
    return Forecast(
        config=config,
        parameters=parameters_by_part(sizes.model),
        flops_per_byte=training_flops(config, model, patch_bytes),
        mean_patch_bytes=patch_bytes,
        sources=sources,
        reading=estimate_reading(sources, config.sources, config.steps * config.global_batch),
        machine=machine,
        mfu=assumed.mfu,
        usual=sizes.micro_batch(config.workers, sizes.usual),
        most=sizes.micro_batch(config.workers, sizes.most),
        worlds=sizes.worlds(machine),
        traffic=sizes.traffic(),
    )
