"""The attempts of a run on a cluster: the jobs that there are in, what to do for another submission of it out.

The first attempt has the run's id, the others -2, -3 and so on behind it. A run that has not ended is attached to. One
that has succeeded is told so, unless it is asked for again. One that failed or was stopped gets another attempt, which
goes on with what the last one left in the output.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from blt.errors import ConfigError
from jobs.cluster.job_server import Job


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What becomes of a submission."""

    kind: Literal["new", "attach", "finished"]
    job_id: str
    attempt: int
    last: Job | None
    """The attempt before, or the one that is attached to or finished."""


def decide(run: str, jobs: Iterable[Job], *, again: bool) -> Decision:
    """What to do for the run, `again` if one that has succeeded shall be done once more."""
    attempts = {attempt: job for job in jobs if (attempt := _attempt(run, job.id)) is not None}
    if not attempts:
        return Decision(kind="new", job_id=run, attempt=1, last=None)
    number = max(attempts)
    last = attempts[number]
    if not last.has_ended:
        return Decision(kind="attach", job_id=last.id, attempt=number, last=last)
    if last.status == "SUCCEEDED" and not again:
        return Decision(kind="finished", job_id=last.id, attempt=number, last=last)
    return Decision(kind="new", job_id=f"{run}-{number + 1}", attempt=number + 1, last=last)


def refuse_shared_output(run: str, output: str | None, jobs: Iterable[Job]) -> None:
    """ConfigError where another run that has not ended writes to the same output."""
    for job in jobs:
        same = output is not None and job.metadata.get("blt_output") == output
        if same and not job.has_ended and _attempt(run, job.id) is None:
            raise ConfigError(
                f"job {job.id} is {job.status} with the same output {output} and another configuration: "
                f"stop it (blt stop {job.id}) or choose another output"
            )


def _attempt(run: str, job_id: str) -> int | None:
    """Which attempt of the run the job is; None if it is no attempt of it."""
    match = re.fullmatch(rf"{re.escape(run)}(?:-([2-9]|[1-9]\d+))?", job_id)
    return None if match is None else int(match[1] or 1)
