"""What a command does beside its work: one function of its configuration for each option such as --status."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jobs.record import JobResult


@dataclass(frozen=True)
class Action:
    """`blt COMMAND --NAME`, where the command's module has ACTIONS = {"NAME": Action(...)}."""

    run: Callable[[Any], JobResult]
    """Takes the command's Config, or that of the action."""
    summary: str
    """Its line in the command's help."""
    config: type | None = None
    """The command's Config with further keys, which no run of the command itself has; None: the command's."""
    options: tuple[str, ...] = ()
    """Those of the further keys that are options too, as of the command's OPTIONS."""
