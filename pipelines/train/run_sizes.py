"""What a run takes of a worker: its configuration in; memory, for any number of workers, and traffic out."""

import functools
from dataclasses import dataclass

import numpy as np
import torch

from blt.activations import ActivationBytes, Computation, activation_bytes, lookup_bytes
from blt.entropy_model import EntropyModel, EntropyModelConfig
from blt.memory_ledger import MemoryLedger, memory_ledger
from blt.model import BLT, BLTConfig
from blt.step import Batch
from blt.traffic_ledger import TrafficLedger, traffic_ledger
from pipelines.train.batch import make_batch
from pipelines.train.config import TrainConfig
from pipelines.train.machine import Machine
from pipelines.train.order import micro_steps
from pipelines.train.packing import PackedSequence, RowGroup

WORLD_SIZES_UP_TO = 8
"""Times the configured workers: how far other numbers of workers are looked at."""


@dataclass(frozen=True, kw_only=True)
class RowShape:
    """Of the sequences of a micro-batch."""

    bytes: int
    patches: int | None
    """None where nothing has patches."""


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """What a worker computes at once."""

    rows: int
    shape: RowShape
    activations: ActivationBytes


@dataclass(frozen=True, kw_only=True)
class WorldSize:
    """The run with another number of workers."""

    workers: int
    memory: MemoryLedger
    fits: bool | None
    """Into the device's memory; None where that is not known."""


class RunSizes:
    """Memory and traffic of a run with any number of workers."""

    def __init__(self, config: TrainConfig, model: BLTConfig | EntropyModelConfig, patch_bytes: float) -> None:
        self.config, self.shape = config, model
        with torch.device("meta"):
            self.model = BLT(model) if isinstance(model, BLTConfig) else EntropyModel(model)
        narrow = torch.bfloat16 if config.precision == "bfloat16" else None
        self.gathered = narrow if narrow is not None and config.survival == "sharded" else torch.float32
        self._how = Computation(
            device="cuda" if config.gpus_per_worker else "cpu",
            autocast=narrow,
            gathered=self.gathered,
            recomputation=config.activation_checkpointing,
        )
        is_blt = isinstance(model, BLTConfig)
        self.most = RowShape(bytes=config.sequence_bytes, patches=config.sequence_patches if is_blt else None)
        self.usual = self.most
        if is_blt:
            num_bytes = max(min(config.sequence_bytes, int(config.sequence_patches * patch_bytes)), 1)
            self.usual = RowShape(
                bytes=num_bytes, patches=min(config.sequence_patches, 1 + int(num_bytes / patch_bytes))
            )
        self._counted = functools.cache(self._count)

    def micro_batch(self, workers: int, shape: RowShape) -> MicroBatch:
        """Of the worker with the most sequences."""
        rows = min(self.config.micro_batch, -(-self.config.global_batch // workers))
        return MicroBatch(rows=rows, shape=shape, activations=self._counted(rows, shape)[0])

    def worlds(self, machine: Machine) -> tuple[WorldSize, ...]:
        """With 1 worker, 2, 3, ... up to WORLD_SIZES_UP_TO times as many as configured."""
        last = WORLD_SIZES_UP_TO * self.config.workers
        return tuple(self._world(workers, machine) for workers in range(1, last + 1))

    def traffic(self) -> TrafficLedger:
        """With the configured workers."""
        config = self.config
        rows = self.micro_batch(config.workers, self.usual).rows
        return traffic_ledger(
            self.model,
            ranks=config.workers,
            spread=config.survival,
            gathered=self.gathered,
            micro_steps=micro_steps(config.global_batch, config.micro_batch, config.workers),
            micro_batch_bytes=rows * self.usual.bytes,
        )

    def _world(self, workers: int, machine: Machine) -> WorldSize:
        config = self.config
        rows = self.micro_batch(workers, self.most).rows
        activations, lookups = self._counted(rows, self.most)
        memory = memory_ledger(
            self.model,
            ranks=workers,
            spread=config.survival,
            gathered=self.gathered,
            activations=activations,
            lookups=lookups,
            accumulates=micro_steps(config.global_batch, config.micro_batch, workers) > 1,
        )
        fits = None if machine.memory_bytes is None else memory.total <= machine.memory_bytes
        return WorldSize(workers=workers, memory=memory, fits=fits)

    def _count(self, rows: int, shape: RowShape) -> tuple[ActivationBytes, int]:
        """Activations of a micro-batch, and what its lookups in n-gram tables keep."""
        batch = _batch(rows, shape)
        tables = self.model.local_encoder.hash_embedding if isinstance(self.model, BLT) else None
        lookups = 0 if tables is None else lookup_bytes(tables, batch)
        return activation_bytes(self.shape, batch, self._how), lookups


def _batch(rows: int, shape: RowShape) -> Batch:
    """A batch of this shape, as the feed makes it: sequences of one document, with patches of the same length."""
    num_patches = shape.bytes + 1 if shape.patches is None else min(shape.patches, shape.bytes + 1)
    borders = np.linspace(1, shape.bytes + 1, num_patches).astype(np.int64)
    document = RowGroup(
        text=np.zeros(shape.bytes + 1, np.uint8), borders=[0, shape.bytes + 3], bits=None, bit_borders=[0, 0]
    )
    sequence = PackedSequence(document, 0, shape.bytes + 1, np.diff(borders))
    return make_batch([sequence] * rows, with_patches=shape.patches is not None)
