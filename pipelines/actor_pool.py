"""The actor pool: one adapter from a stage's declared resources to Ray Data, shared by patch, calibrate and eval.

In: work units (small dicts) and an actor class. Out: the small dict that each unit returns, in the order of completion.
The units travel through Ray Data, the data does not: actors read their shard from storage and write it there.
"""

import gc
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ray
import ray.data
from ray.data import ActorPoolStrategy
from ray.data.exceptions import ExecutionTimeoutError

from blt.errors import BltError, ConfigError
from pipelines.ray_data import quiet_ray_data

_MAX_DEATHS_PER_ACTOR = 8
"""Deaths of one actor, and retries of one unit, that are made good before the job fails: a unit that kills its process
every time must end the job (an unlimited budget and a dead pool hang for ever, ray-project/ray#62746)."""
_BLOCKS_PER_ACTOR = 64
_MOST_UNITS_PER_BLOCK = 16
"""Ray Data spends 15 ms on a block, so many units share blocks, as long as an actor has enough of them: 10,000 units
for one actor take 10 s of the driver instead of 150."""

Unit = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class ActorPoolConfig:
    """Actors that run a model, and what each of them takes."""

    min_actors: int = 1
    """Fewest actors; the pool starts with as many as fit, up to max_actors."""
    max_actors: int | None = None
    """Most actors; null: as many as the cluster's CPUs (or GPUs) hold when the job starts."""
    cpus_per_actor: int = 1
    """CPUs of one actor, which are also its torch threads."""
    gpus_per_actor: float = 0.0
    """GPUs of one actor; a fraction lets several share one; more than 0 with device cuda."""
    memory_bytes_per_actor: int = 0
    """Memory of one actor that Ray sets aside when it places it; 0 sets none aside."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the entropy model runs; part of the dataset's identity, since entropies differ in their last digits."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the entropy model's weights; part of the dataset's identity."""
    row_bytes: int = 8192
    """Bytes of one row of inference: short documents share a row, long ones stream through."""
    wait_for_resources: bool = False
    """true on an autoscaling cluster: wait for nodes instead of refusing what the cluster cannot hold now."""
    stall_seconds: float = 7200.0
    """Fail when no unit of work finishes for this long."""

    def __post_init__(self) -> None:
        if self.min_actors < 1 or (self.max_actors is not None and self.max_actors < self.min_actors):
            raise ConfigError(
                f"min_actors and max_actors must satisfy 1 <= min_actors <= max_actors, "
                f"got {self.min_actors} and {self.max_actors}"
            )
        for name, least in (("cpus_per_actor", 1), ("row_bytes", 1), ("memory_bytes_per_actor", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.stall_seconds <= 0:
            raise ConfigError(f"stall_seconds must be above 0, got {self.stall_seconds}")
        if (self.device == "cuda") != (self.gpus_per_actor > 0):
            raise ConfigError(
                f"device {self.device} does not fit gpus_per_actor {self.gpus_per_actor:g}: "
                "cuda needs more than 0, cpu needs 0"
            )
        for name, choices in (("device", ("cpu", "cuda")), ("dtype", ("float32", "bfloat16"))):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")


def run_units(
    units: Sequence[Unit], actor: type, arguments: Mapping[str, Any], config: ActorPoolConfig
) -> Iterator[dict[str, Any]]:
    """Yield what `actor(**arguments)` returns for each unit, as it completes; a dead actor's units run again.

    `actor.__call__` takes and returns a one-row batch (dict of arrays or lists), at least once per unit. An error it
    raises ends the stream with that error. Ray must be initialised.
    """
    if not units:
        return
    num_actors = _pool_size(len(units), config)
    units_per_block = min(max(1, len(units) // (num_actors * _BLOCKS_PER_ACTOR)), _MOST_UNITS_PER_BLOCK)
    num_blocks = math.ceil(len(units) / units_per_block)
    stall_seconds = config.stall_seconds * units_per_block
    try:
        with quiet_ray_data(stall_seconds):
            yield from _dataset(units, num_blocks, actor, arguments, num_actors, config).iter_rows()
        return
    except ray.exceptions.RayTaskError as error:
        fault = _raised_by_actor(error)
    except ray.exceptions.RayActorError as error:
        fault = BltError(
            f"an actor of {actor.__name__} died, with no more of its {_MAX_DEATHS_PER_ACTOR} restarts left "
            f"(out of memory?): {' '.join(str(error).split())[:300]}"
        )
    except ExecutionTimeoutError:
        fault = BltError(
            f"no block of {units_per_block} units of work finished for {stall_seconds:g} s "
            f"(stall_seconds={config.stall_seconds:g} for each)"
        )
    # Ray Data ends actors when nobody refers to them any more; its frames do, and cycles among them. So what led to the
    # error must not hang on it: whoever keeps it would keep the actors too, with their CPUs and GPUs.
    gc.collect()
    raise fault


def _raised_by_actor(error: ray.exceptions.RayTaskError) -> Exception:
    """Ours as it was raised; another with all that Ray tells of it, the actor's traceback too, in its text."""
    if isinstance(error.cause, BltError):
        # Ray Data appends advice about its own retry settings to the message.
        return type(error.cause)(str(error.cause).partition("\nFailed to apply")[0])
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def _dataset(
    units: Sequence[Unit],
    num_blocks: int,
    actor: type,
    arguments: Mapping[str, Any],
    num_actors: int,
    config: ActorPoolConfig,
) -> ray.data.Dataset:
    """The units in blocks, mapped over a pool of actors."""
    with warnings.catch_warnings():
        # Ray 2.60 calls max_restarts and max_task_retries deprecated and has no other name for them yet.
        warnings.simplefilter("ignore", DeprecationWarning)
        return ray.data.from_items([dict(unit) for unit in units], override_num_blocks=num_blocks).map_batches(
            actor,
            batch_size=1,
            fn_constructor_kwargs=dict(arguments),
            compute=ActorPoolStrategy(
                min_size=min(config.min_actors, num_actors),
                max_size=num_actors,
                initial_size=num_actors,
                max_tasks_in_flight_per_actor=1,  # a queued unit would wait behind one actor while another is idle
            ),
            num_cpus=config.cpus_per_actor,
            num_gpus=config.gpus_per_actor,
            memory=config.memory_bytes_per_actor or None,
            max_restarts=_MAX_DEATHS_PER_ACTOR,
            max_task_retries=_MAX_DEATHS_PER_ACTOR,
        )


def _pool_size(num_units: int, config: ActorPoolConfig) -> int:
    """Actors to start: no more than there are units, and than the cluster holds unless it may grow."""
    resources = ray.cluster_resources()
    fits = int(resources.get("CPU", 0) // config.cpus_per_actor)
    if config.gpus_per_actor:
        fits = min(fits, int(resources.get("GPU", 0) / config.gpus_per_actor))
    if config.memory_bytes_per_actor:
        fits = min(fits, int(resources.get("memory", 0) // config.memory_bytes_per_actor))
    if fits < config.min_actors and not config.wait_for_resources:
        raise ConfigError(
            f"the cluster holds {fits} actors of cpus_per_actor={config.cpus_per_actor} "
            f"gpus_per_actor={config.gpus_per_actor:g} memory_bytes_per_actor={config.memory_bytes_per_actor} (it has "
            f"{resources.get('CPU', 0):g} CPUs, {resources.get('GPU', 0):g} GPUs and "
            f"{resources.get('memory', 0):.0f} bytes of memory), min_actors={config.min_actors} are asked for; "
            "ask for less, or set wait_for_resources=true on an autoscaling cluster"
        )
    most = config.max_actors or max(fits, config.min_actors)
    if not config.wait_for_resources:
        most = min(most, fits)
    return max(1, min(most, num_units))
