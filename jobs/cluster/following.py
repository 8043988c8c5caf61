"""Staying with a job until it ends: with its log, or in silence. Whatever happens here, the job goes on."""

import asyncio
import json
import logging
import time
from collections.abc import Callable

from blt.errors import ClusterError
from jobs.cluster.job_server import Job, JobServer, ServerAwayError
from jobs.record import JobResult

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0
PATIENCE_SECONDS = 120.0
"""How long a server may be away before it is given up; a job lives on while nobody looks."""


class Detached(KeyboardInterrupt):
    """Ctrl-C while a job was being watched."""


def wait(server: JobServer, job_id: str) -> Job:
    """The job once it has ended. Detached on Ctrl-C, ServerAwayError once the server is away for PATIENCE_SECONDS."""
    return _stay(server, job_id, lambda: _poll(server, job_id))


def follow(server: JobServer, job_id: str, write: Callable[[str], object]) -> Job:
    """The same, with the job's log passed to `write` as it grows, from its start."""
    shown = 0  # characters: a log that is followed again starts from its beginning

    async def pass_on() -> None:
        nonlocal shown
        seen = 0
        async for text in server.log_as_it_grows(job_id):
            seen += len(text)
            if seen > shown:
                write(text[-(seen - shown) :])
                shown = seen

    def once() -> Job | None:
        asyncio.run(pass_on())
        return _poll(server, job_id)

    return _stay(server, job_id, once)


def outcome(server: JobServer, job: Job) -> JobResult:
    """What a job that has succeeded reports: the result of its command. ClusterError for one that has not."""
    said = _last_result(server.log(job.id))
    if job.status != "SUCCEEDED":
        reason = said.get("error") if said.get("status") == "failed" else None
        what = "was stopped" if job.status == "STOPPED" else "failed"
        raise ClusterError(f"job {job.id} {what}: {reason or job.message or 'no reason given'} (blt logs {job.id})")
    figures = {"job": job.id, "job_status": job.status}
    result = JobResult.from_plain({name: value for name, value in said.items() if name not in figures})
    return JobResult.from_plain(result.to_plain() | figures)


def _stay(server: JobServer, job_id: str, look: Callable[[], Job | None]) -> Job:
    """Look until the job has ended."""
    last_seen = time.monotonic()
    try:
        while True:
            try:
                job = look()
                last_seen = time.monotonic()
            except ServerAwayError as error:
                if time.monotonic() - last_seen > PATIENCE_SECONDS:
                    raise ServerAwayError(f"{error}; the job may go on: {_how_to_attach(job_id)}") from error.__cause__
                logger.warning("%s; trying again", error)
                job = None
            if job is not None:
                return job
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt as interrupt:
        raise Detached(f"interrupted; job {job_id} goes on: {_how_to_attach(job_id)}") from interrupt


def _poll(server: JobServer, job_id: str) -> Job | None:
    job = server.job(job_id)
    return job if job.has_ended else None


def _how_to_attach(job_id: str) -> str:
    return f"`blt logs {job_id} --follow` attaches again, `blt stop {job_id}` ends it"


def _last_result(log: str) -> dict[str, object]:
    """The last line of a log that is the result of a command; empty if there is none."""
    for line in reversed(log.splitlines()):
        if line.startswith('{"status": '):
            try:
                found = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(found, dict):
                return found
    return {}
