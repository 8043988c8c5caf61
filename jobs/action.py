"""What a command does beside its work: one function of its configuration for each option such as --status."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jobs.record import JobResult


@dataclass(frozen=True)
class Action:
    """`blt COMMAND --NAME`, where the command's module has ACTIONS = {"NAME": Action(...)}."""

    run: Callable[[Any], JobResult]
    """Takes the command's Config."""
    summary: str
    """Its line in the command's help."""
