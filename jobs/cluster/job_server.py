"""A cluster's job server through Ray's client: plain jobs out, errors of one line that name the server."""

import contextlib
import logging
import re
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobSubmissionClient, JobType

from blt.errors import ClusterError, ConfigError
from jobs.cluster.access import Access, find_access
from jobs.cluster.address import ENVIRONMENT, Address, find_address
from pipelines.environment import environment_without

ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


class ServerAwayError(ClusterError):
    """The job server does not answer now; it may again."""


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Which cluster, and how it may be talked to."""

    address: str | None = None
    """Job server of the cluster: http(s)://HOST:PORT. null takes RAY_API_SERVER_ADDRESS, or port 8265 of this
    machine."""
    insecure: bool = False
    """Talk to a job server off this machine that lets anybody in."""
    token_over_http: bool = False
    """Send the token over http to another machine, where whoever is between can read it."""


CLUSTER_OPTIONS = ("address", "insecure", "token_over_http")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A submitted job as its server tells of it."""

    id: str
    status: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    message: str
    entrypoint: str
    metadata: Mapping[str, str]
    started_ms: int | None
    """Unix time."""
    ended_ms: int | None

    @property
    def has_ended(self) -> bool:
        return self.status in ENDED


class JobServer:
    """The jobs of one cluster. ServerAwayError where it does not answer, ClusterError where it refuses."""

    def __init__(self, address: Address, access: Access) -> None:
        self.url = address.url
        # Ray's client lets these two override the address that it is given, which is the one that was looked into.
        with environment_without("RAY_ADDRESS", ENVIRONMENT), self._errors():
            self._client = JobSubmissionClient(address.url, headers=dict(access.headers))

    @property
    def ray_version(self) -> str:
        """Of the cluster, as it told when it was connected to."""
        return str(self._client._server_ray_version)

    def jobs(self) -> list[Job]:
        """All jobs that were submitted to it, the oldest first."""
        with self._errors():
            found = self._client.list_jobs()
        jobs = [_job(details) for details in found if details.type == JobType.SUBMISSION]
        return sorted(jobs, key=lambda job: (job.started_ms or 0, job.id))

    def job(self, job_id: str) -> Job:
        """The job of that id. ConfigError if there is none."""
        with self._errors(job_id):
            return _job(self._client.get_job_info(job_id))

    def submit(self, job_id: str, entrypoint: str, **request: Any) -> None:
        """Start a job; `request` as of JobSubmissionClient.submit_job."""
        with self._errors():
            self._client.submit_job(submission_id=job_id, entrypoint=entrypoint, **request)

    def stop(self, job_id: str) -> None:
        """Ask a job to end; it has some seconds to do so."""
        with self._errors(job_id):
            self._client.stop_job(job_id)

    def log(self, job_id: str) -> str:
        """All that a job has printed so far."""
        with self._errors(job_id):
            return str(self._client.get_job_logs(job_id))

    async def log_as_it_grows(self, job_id: str) -> AsyncIterator[str]:
        """What a job has printed, from its start, and goes on to print until it ends."""
        with self._errors(job_id):
            async for text in self._client.tail_job_logs(job_id):
                yield text

    @contextlib.contextmanager
    def _errors(self, job_id: str = "") -> Iterator[None]:
        try:
            yield
        except (requests.RequestException, aiohttp.ClientError, ConnectionError, TimeoutError) as error:
            raise ServerAwayError(f"{self.url}: the job server does not answer ({type(error).__name__})") from error
        except AuthenticationError as error:
            raise ConfigError(f"{self.url}: the job server does not accept the token (RAY_AUTH_TOKEN)") from error
        except RuntimeError as error:
            text = str(error)
            if job_id and "status code 404" in text:
                raise ConfigError(f'{self.url} has no job "{job_id}" (`blt jobs` lists them)') from error
            raise ClusterError(f"{self.url}: {_reason(text)}") from error


def connect(config: ClusterConfig) -> tuple[JobServer, Access]:
    """The job server that the configuration means, once it is known what it asks for. As `find_access`."""
    address = find_address(config.address)
    access = find_access(address, insecure=config.insecure, token_over_http=config.token_over_http)
    # Ray's client tells of every upload and every address; what matters of it is told here.
    for name in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return JobServer(address, access), access


def _job(details: JobDetails) -> Job:
    return Job(
        id=details.submission_id or "",
        status=str(details.status.value),
        message=details.message or "",
        entrypoint=details.entrypoint,
        metadata=details.metadata or {},
        started_ms=details.start_time,
        ended_ms=details.end_time,
    )


def _reason(text: str) -> str:
    """The last line of a traceback that the server has answered with."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip(" .")]
    status = re.search(r"status code \d+", text)
    return f"the job server refuses ({status.group() if status else 'no status'}): {lines[-1] if lines else ''}"
