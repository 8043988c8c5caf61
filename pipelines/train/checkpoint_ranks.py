"""Agreement of the ranks of a run: what each of them finds out in, the same answer or the same error on all out."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch.distributed as dist

from blt.errors import BltError, CheckpointError, CheckpointStorageError, StorageError

Answer = TypeVar("Answer")


class Ranks:
    """All ranks of the default process group, talking over a gloo group of their own, so that another thread may use
    the default one meanwhile; one rank alone where there is no process group. Made by all ranks together.

    An error of storage on one rank (BltError, OSError) is a CheckpointError on every rank, never a rank that waits; a
    CheckpointStorageError where it may pass.
    """

    def __init__(self) -> None:
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self.rank = dist.get_rank() if self.group is not None else 0
        self.world_size = dist.get_world_size() if self.group is not None else 1

    def all(self, ask: Callable[[], Answer]) -> list[Answer]:
        """What each rank answers, by rank."""
        outcomes: list[Any] = [_outcome(ask)]
        if self.group is not None:
            own, outcomes = outcomes[0], [None] * self.world_size
            dist.all_gather_object(outcomes, own, group=self.group)
        return [_answer(rank, outcome) for rank, outcome in enumerate(outcomes)]

    def first(self, ask: Callable[[], Answer]) -> Answer:
        """What rank 0 answers; the others do not ask."""
        outcomes: list[Any] = [_outcome(ask) if self.rank == 0 else None]
        if self.group is not None:
            dist.broadcast_object_list(outcomes, group=self.group, group_src=0)
        return cast(Answer, _answer(0, outcomes[0]))


def one_line(error: BaseException) -> str:
    """What an error says, or its name where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def may_pass(error: BaseException) -> bool:
    """Whether storage failed in a way that another time may not."""
    return isinstance(error, StorageError | OSError)


def _outcome(ask: Callable[[], Any]) -> tuple[Any, str | None, bool]:
    """The answer; or what went wrong, and whether that may pass."""
    try:
        return ask(), None, False
    except (BltError, OSError) as error:
        return None, one_line(error), may_pass(error)


def _answer(rank: int, outcome: tuple[Any, str | None, bool]) -> Any:
    answer, error, passes = outcome
    if error is not None:
        raise (CheckpointStorageError if passes else CheckpointError)(f"rank {rank}: {error}")
    return answer
