"""List the jobs of a cluster, the oldest first."""

import datetime
import time
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from jobs.cluster.job_server import CLUSTER_OPTIONS, ClusterConfig, Job, connect
from jobs.record import JobResult


@dataclass(frozen=True, kw_only=True)
class Config(ClusterConfig):
    """Keys of `blt jobs`."""


OPTIONS = CLUSTER_OPTIONS


def run(config: Config) -> JobResult:
    """Print a table of the jobs; the result holds the status of each."""
    server, _ = connect(config)
    jobs = server.jobs()
    table = Table(box=None, pad_edge=False)
    for column in ("job", "status", "started", "seconds", "output or command"):
        table.add_column(column, no_wrap=True, justify="right" if column == "seconds" else "left")
    for job in jobs:
        table.add_row(*_row(job))
    Console(width=None if jobs else 80, soft_wrap=True).print(table)
    return JobResult(figures={"jobs": len(jobs), **{f"job.{job.id}": job.status for job in jobs}})


def _row(job: Job) -> tuple[str, ...]:
    if job.started_ms is None:
        return job.id, job.status, "", "", _what(job)
    started = datetime.datetime.fromtimestamp(job.started_ms / 1000).astimezone()
    ended = job.ended_ms / 1000 if job.ended_ms else time.time()
    return job.id, job.status, f"{started:%Y-%m-%d %H:%M}", f"{ended - job.started_ms / 1000:.0f}", _what(job)


def _what(job: Job) -> str:
    return job.metadata.get("blt_output") or job.entrypoint
