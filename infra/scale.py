"""What corpora of terabytes and runs on many GPUs take: measured and published figures in, tables of docs/scale.md out.

    python -m infra.scale [--gpu-hour 3.0] [--small-gpu-hour 0.5] [--core-hour 0.04]

Parameters, FLOPs and bytes sent are computed from the packaged configurations by the ledgers that `blt train --dry-run`
uses. Nothing here is measured on a GPU.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from blt.device_peak import published_device
from blt.flops import entropy_flops_per_byte
from blt.model import BLT
from blt.traffic_ledger import TrafficLedger, traffic_ledger
from jobs import train, train_entropy
from jobs.configuration import find_config, load_config
from pipelines.schema import ROW_GROUP_BYTES
from pipelines.shard.config import ShardConfig
from pipelines.train.job import training_flops
from pipelines.train.order import micro_steps

TB, GB, MB, KB = 1e12, 1e9, 1e6, 1e3
GPUS_PER_NODE = 8


@dataclass(frozen=True, kw_only=True)
class Measured:
    """On two cores of a virtual machine; docs/scale.md says how."""

    shard_bytes_per_core_second: float = 102e6
    """`blt shard`: plain JSONL, documents of about 4 kB, CPU time of one process."""
    feed_bytes_per_core_second: float = 83e6
    """`blt bench feed`, docs/performance.md."""
    stored_bytes_per_byte: float = 0.351
    """Of a patch dataset without entropies, docs/performance.md."""
    writes_per_shard_made: float = 5.0
    """PUTs and their kind of `blt shard`, for each shard of 50 MB."""
    writes_per_shard_patched: float = 5.0
    reads_per_shard_patched: float = 14.0
    reads_per_shard_indexed: float = 20.0
    reads_per_row_group: float = 5.0
    """Of training, once an epoch."""
    tasks_per_second: float = 1000.0
    """Ray tasks without work, submitted and fetched by one driver; both cores were busy with other things too."""
    driver_bytes_per_task: float = 6.2e3
    """Of tasks that wait."""
    seconds_per_block: float = 0.015
    """Of the driver, for a block of Ray Data (pipelines/actor_pool.py)."""
    manifest_bytes_per_shard: float = 236.0
    index_bytes_per_row_group: float = 84.0
    driver_bytes_per_shard: float = 1.7e3
    """Manifest, plan and commits in memory."""
    bytes_per_row_group: float = 0.3e3
    """Index and order in memory, of the driver and of every worker."""


@dataclass(frozen=True, kw_only=True)
class Assumed:
    """What nobody has measured here, and prices, which change: dollars of 2026-11, made up at round numbers near what
    clouds list for spot capacity."""

    training_mfu: float = 0.4
    inference_mfu: float = 0.3
    mean_patch_bytes: float = 4.5
    document_bytes: float = 4000.0
    gpu_hour: float = 3.0
    """H100."""
    small_gpu_hour: float = 0.5
    """L4."""
    core_hour: float = 0.04
    million_writes: float = 5.0
    million_reads: float = 0.4
    nvlink_bytes_per_second: float = 450e9
    """Of an H100, one way; NVIDIA's data sheet."""
    rdma_bytes_per_second: float = 400e9
    """Of a node with eight adapters of 400 Gbit/s."""
    tcp_bytes_per_second: float = 12.5e9
    """Of a node with 100 Gbit/s and no RDMA."""


MEASURED = Measured()


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def short(value: float) -> str:
    """Three digits, with separators."""
    if value >= 100:
        return f"{float(f'{value:.3g}'):,.0f}"
    return f"{value:.3g}"


def dollars(value: float) -> str:
    return f"${short(value)}"


def days(seconds: float) -> str:
    if seconds < 3600:
        return f"{short(seconds / 60)} min"
    return f"{short(seconds / 3600)} h" if seconds < 48 * 3600 else f"{short(seconds / 86400)} d"


def peak(device: str) -> float:
    found = published_device(device)
    assert found is not None
    return found.bfloat16_flops


def entropy_bytes_per_second(device: str, assumed: Assumed) -> float:
    """Of the packaged entropy model on one device."""
    config = load_config(train_entropy.Config, find_config("entropy_100m"), ["documents=documents", "output=run"])
    flops = entropy_flops_per_byte(config.model, assumed.document_bytes)
    return peak(device) * assumed.inference_mfu / flops


def corpora(assumed: Assumed) -> str:
    """Sharding and patching 1 TB and 15 TB."""
    rows = []
    for size in (TB, 15 * TB):
        core_seconds = size / MEASURED.shard_bytes_per_core_second
        price = core_seconds / 3600 * assumed.core_hour
        rows.append([terabytes(size), "shard", "64 cores", rate(64 * MEASURED.shard_bytes_per_core_second)])
        rows[-1] += [days(core_seconds / 64), f"{short(core_seconds / 3600)} core-h", dollars(price)]
        for device, count, hour in (("L4", 64, assumed.small_gpu_hour), ("H100", 16, assumed.gpu_hour)):
            speed = entropy_bytes_per_second(device, assumed)
            hours = size / speed / 3600
            rows.append([terabytes(size), "patch", f"{count} x {device}", rate(count * speed)])
            rows[-1] += [days(size / speed / count), f"{short(hours)} GPU-h", dollars(hours * hour)]
    return table(["text", "stage", "on", "bytes/s", "time", "work", "price"], rows)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A packaged model on a number of H100s."""

    name: str
    gpus: int
    flops_per_byte: float
    update_bytes: float
    traffic: TrafficLedger
    parameters: int

    def bytes_per_second(self, assumed: Assumed) -> float:
        return self.gpus * peak("H100") * assumed.training_mfu / self.flops_per_byte

    def update_seconds(self, assumed: Assumed) -> float:
        return self.update_bytes / self.bytes_per_second(assumed)

    def network_seconds(self, assumed: Assumed, node_bytes_per_second: float) -> float:
        """Of an update, if nothing else held it up. Within a node each GPU sends over NVLink. Between nodes, what is
        gathered has to come into each node once, and goes on over NVLink; sums of n-gram rows go from every GPU to
        every other."""
        if self.gpus <= GPUS_PER_NODE:
            return self.traffic.total / assumed.nvlink_bytes_per_second
        tables = GPUS_PER_NODE * self.traffic.tables.by_columns
        return (self.traffic.weights + self.traffic.gradients + tables) / node_bytes_per_second


MICRO_BATCHES = {"blt_1b": 4, "blt_8b": 1}
"""Sequences at once that fit an H100 of 80 GB beside eight workers' state: 59 and 59 GB by `--dry-run`."""


def run_of(name: str, gpus: int, assumed: Assumed) -> Run:
    config = load_config(train.Config, find_config(name), ["data=patches", "output=run"])
    config = dataclasses.replace(config, workers=gpus, micro_batch=MICRO_BATCHES[name])
    with torch.device("meta"):
        model = BLT(config.model)
    sequence_bytes = min(config.sequence_bytes, int(config.sequence_patches * assumed.mean_patch_bytes))
    rows = min(config.micro_batch, -(-config.global_batch // gpus))
    return Run(
        name=name,
        gpus=gpus,
        flops_per_byte=sum(training_flops(config, config.model, assumed.mean_patch_bytes).values()),
        update_bytes=config.global_batch * sequence_bytes,
        traffic=traffic_ledger(
            model,
            ranks=gpus,
            spread="sharded",
            gathered=torch.bfloat16,
            micro_steps=micro_steps(config.global_batch, config.micro_batch, gpus),
            micro_batch_bytes=rows * sequence_bytes,
        ),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


def trainings(assumed: Assumed) -> str:
    """The packaged 1B and 8B models on 8, 64 and 512 H100s."""
    rows = []
    for name in ("blt_1b", "blt_8b"):
        for gpus in (8, 64, 512):
            run = run_of(name, gpus, assumed)
            speed, update = run.bytes_per_second(assumed), run.update_seconds(assumed)
            network = [
                f"{100 * run.network_seconds(assumed, bandwidth) / update:.0f} %"
                for bandwidth in (assumed.rdma_bytes_per_second, assumed.tcp_bytes_per_second)
            ]
            rows.append([name, str(gpus), rate(speed), f"{update:.2f} s", f"{run.traffic.total / GB:.0f} GB"])
            rows[-1] += [
                network[0],
                network[1] if gpus > GPUS_PER_NODE else "",
                days(TB / speed),
                days(15 * TB / speed),
            ]
            rows[-1] += [f"{speed / MEASURED.feed_bytes_per_core_second:.2g}"]
    head = [
        "model",
        "H100s",
        "bytes/s",
        "update",
        "sent by a GPU",
        "network: RDMA",
        "TCP",
        "1 TB",
        "15 TB",
        "feed cores",
    ]
    return table(head, rows)


def prices(assumed: Assumed) -> str:
    """GPU-hours do not depend on how many GPUs share them, as long as the network keeps up."""
    rows = []
    for name in ("blt_1b", "blt_8b"):
        run = run_of(name, 8, assumed)
        hours = [size / run.bytes_per_second(assumed) * run.gpus / 3600 for size in (TB, 15 * TB)]
        rows.append([name, f"{run.parameters / GB:.2f} billion", f"{12 * run.parameters / GB:.0f} GB"])
        rows[-1] += [f"{short(each)} GPU-h, {dollars(each * assumed.gpu_hour)}" for each in hours]
    return table(["model", "parameters", "a checkpoint", "1 TB", "15 TB"], rows)


def bookkeeping(assumed: Assumed) -> str:
    """What names and counts take, for numbers of shards."""
    usual, rows = ShardConfig(input=("corpus",)).shard_bytes, list[list[str]]()
    for size, shard_bytes in ((TB, usual), (15 * TB, 150e6), (15 * TB, usual)):
        shards = size / shard_bytes
        row_groups = shards * -(-shard_bytes // ROW_GROUP_BYTES)
        writes = shards * (MEASURED.writes_per_shard_made + MEASURED.writes_per_shard_patched)
        reads = shards * (MEASURED.reads_per_shard_patched + MEASURED.reads_per_shard_indexed)
        reads += row_groups * MEASURED.reads_per_row_group
        price = writes / 1e6 * assumed.million_writes + reads / 1e6 * assumed.million_reads
        rows.append([f"{short(shards)} of {short(shard_bytes / MB)} MB", short(row_groups)])
        rows[-1] += [f"{short(shards * MEASURED.manifest_bytes_per_shard / MB)} MB"]
        rows[-1] += [f"{short(row_groups * MEASURED.index_bytes_per_row_group / MB)} MB"]
        rows[-1] += [f"{short(shards * MEASURED.driver_bytes_per_shard / MB)} MB"]
        rows[-1] += [f"{short(row_groups * MEASURED.bytes_per_row_group / MB)} MB"]
        rows[-1] += [
            f"{days(shards / MEASURED.tasks_per_second)}, {short(shards * MEASURED.driver_bytes_per_task / MB)} MB"
        ]
        rows[-1] += [days(shards / 16 * MEASURED.seconds_per_block)]
        rows[-1] += [f"{short(writes / 1e6)} + {short(reads / 1e6)} million, {dollars(price)}"]
    head = [
        "shards",
        "row groups",
        "manifest",
        "index",
        "driver: patch",
        "worker: index",
        "index tasks",
        "patch blocks",
    ]
    return table([*head, "writes + reads of S3"], rows)


def terabytes(size: float) -> str:
    return f"{size / TB:.0f} TB"


def rate(bytes_per_second: float) -> str:
    for unit, name in ((GB, "GB"), (MB, "MB"), (KB, "kB")):
        if bytes_per_second >= unit:
            return f"{short(bytes_per_second / unit)} {name}/s"
    return f"{short(bytes_per_second)} B/s"


TABLES = {"corpora": corpora, "trainings": trainings, "prices": prices, "bookkeeping": bookkeeping}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m infra.scale", description="The tables of docs/scale.md.")
    for name in ("gpu_hour", "small_gpu_hour", "core_hour", "training_mfu", "inference_mfu", "mean_patch_bytes"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=getattr(Assumed(), name))
    assumed = Assumed(**vars(parser.parse_args(arguments)))
    for name, make in TABLES.items():
        sys.stdout.write(f"{name}\n\n{make(assumed)}\n\n")


if __name__ == "__main__":
    main()
