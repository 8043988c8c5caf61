"""The checkpoints of a run: tensors by name in, whole checkpoints on a local directory or S3 out, and back.

OUTPUT/checkpoints/RUN/step-00000100/ holds what `pipelines.train.checkpoint_files` says. Every rank calls `save` and
`load_newest`; tensors may be DTensors on any mesh (plain ones are equal on all ranks), and come back at any number of
ranks. A checkpoint that is broken (a file is missing, cut or changed) is told and passed over for the one before.
Works without a process group too.
"""

import functools
import logging
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import NamedTuple

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from blt.errors import CheckpointError, CheckpointStorageError
from pipelines.storage import Storage
from pipelines.train.checkpoint_directory import CHECKPOINTS_NAME, CheckpointDirectory
from pipelines.train.checkpoint_files import FilesReader, FilesWriter
from pipelines.train.checkpoint_ranks import Ranks, may_pass, one_line
from pipelines.train.checkpoint_record import RECORD_NAME, CheckpointRecord

__all__ = ["CHECKPOINTS_NAME", "Checkpoints", "Loaded", "Saved"]

logger = logging.getLogger(__name__)


class Saved(NamedTuple):
    """A checkpoint that is whole."""

    step: int
    blocked_seconds: float
    """Time that the caller waited."""
    seconds: float


class Loaded(NamedTuple):
    """Where the tensors that were filled stand."""

    step: int
    state: dict[str, int]
    passed_over: list[str]
    """What was wrong with newer checkpoints, a line for each broken file."""


class _Snapshot(NamedTuple):
    """What is to be saved."""

    step: int
    state: dict[str, int]
    tensors: Mapping[str, Tensor]
    parts: Mapping[str, Tensor] | None
    """Copies in host memory of what this rank holds of them; without, the tensors stand still meanwhile."""


class Checkpoints:
    """Of the run named `run` below `output`, the newest `keep` of them. Made by all ranks together."""

    def __init__(
        self,
        output: str,
        run: str,
        keep: int,
        *,
        on_saved: Callable[[Saved], object] = lambda saved: None,
        on_failed: Callable[[CheckpointError], object] = lambda error: None,
        on_broken: Callable[[str], object] = lambda faults: None,
    ) -> None:
        """on_saved: told on rank 0 of each checkpoint. on_failed: of each one in the background that could not be
        written. Both from another thread where the save was in the background. on_broken: told on rank 0 of each
        checkpoint that is passed over, with what is wrong with it.
        """
        self._directory = CheckpointDirectory(Storage(output), run)
        self._run, self._keep = run, keep
        self._on_saved, self._on_failed, self._on_broken = on_saved, on_failed, on_broken
        self._ranks = Ranks()
        self._stager: DefaultStager | None = None
        self._pending: Future[None] | None = None
        # Of each save and load without a group; not caught there, because two threads would change the filters at once.
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, newest first."""
        return self._directory.steps()

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, int], *, wait: bool) -> None:
        """Write a checkpoint, after the one that may be under way.

        wait: CheckpointError on every rank if it fails; the checkpoints before stay. Otherwise the tensors are copied
        to host memory and written from there, while the caller goes on and may change them.
        """
        began = time.perf_counter()
        self.wait()
        snapshot = _Snapshot(step, dict(state), tensors, None if wait else self._copied(tensors))
        if wait:
            self._save(snapshot, began, None)
        else:
            blocked = time.perf_counter() - began
            self._pending = _in_background(functools.partial(self._save_or_tell, snapshot, began, blocked))

    def clean(self) -> None:
        """Remove what is not part of the newest checkpoints, once no rank saves any more."""
        self._directory.tidy(self._keep, alone=True)

    def wait(self) -> None:
        """Until no save is under way. One that failed was told to `on_failed`; raises only what is no failure to write,
        such as the loss of another rank.
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def load_newest(self, tensors: Mapping[str, Tensor]) -> Loaded | None:
        """Fill `tensors` in place from the newest checkpoint that is sound; None if there never was one.

        CheckpointError on every rank if that is another run's, its tensors have other names or shapes, or storage
        fails; then the tensors may hold anything. And if there are checkpoints but all are broken: beginning anew over
        them would lose without a word what could be put back.
        """
        broken: dict[int, list[str]] = {}
        while (found := self._ranks.first(lambda: self._directory.newest(broken))) is not None:
            step, data = found
            record, faults_found = self._examined(step, data)
            if record is not None and not faults_found:
                self._directory.check_fit(record, tensors)
                if foreign := record.tensors.keys() - tensors.keys():
                    url = self._directory.url(step)
                    raise CheckpointError(f"{url}: holds tensors of another model, such as {min(foreign)}")
                try:
                    self._fill(record, tensors)
                    return Loaded(record.step, record.state, [fault for faults in broken.values() for fault in faults])
                except CheckpointError:
                    if self._is_there(step, data):
                        raise
            # Replicas that train meanwhile remove old checkpoints: one that went is not broken, and there is a newer.
            if not self._is_there(step, data):
                continue
            broken[step] = faults_found
            if self._ranks.rank == 0:
                faults = "; ".join(broken[step])
                logger.warning("a checkpoint is broken, going back to the one before: %s", faults)
                self._on_broken(faults)
            self._ranks.first(functools.partial(self._directory.set_aside, step, data))
        if records := self._ranks.first(self._directory.broken_records):
            raise CheckpointError(
                f"{self._directory.url()}: every checkpoint of this run is broken ({', '.join(records)}); put the "
                f"files of one back and name its record {RECORD_NAME} again, or remove the directory to begin anew"
            )
        return None

    def _is_there(self, step: int, data: bytes) -> bool:
        """Whether the record of a checkpoint is still the one that was read."""
        return self._ranks.first(lambda: self._directory.holds(step, data))

    def load_model(self, step: int, weights: Mapping[str, Tensor]) -> None:
        """Fill plain tensors, by the names of the parameters, in place; one process does it, whatever others do.

        No optimizer state is read. CheckpointError if the checkpoint is broken or does not fit.
        """
        tensors = {f"model.{name}": tensor for name, tensor in weights.items()}
        try:
            record = self._directory.decode(step, self._directory.record_bytes(step))
            self._directory.check_fit(record, tensors)
            files = {part.file for name in tensors for part in record.tensors[name].parts}
            faults = self._directory.faults(record, sorted(files))
        except (ValueError, OSError) as error:
            raise CheckpointError(one_line(error)) from error
        if faults:
            raise CheckpointError("; ".join(faults))
        self._fill(record, tensors, alone=True)

    def _save(self, snapshot: _Snapshot, began: float, blocked: float | None) -> None:
        step, state, tensors, parts = snapshot
        record = CheckpointRecord(
            step=step, run=self._run, world_size=self._ranks.world_size, state=state, files={}, tensors={}
        )
        writer = FilesWriter(self._directory.storage, self._directory.path(step), record)
        try:
            save(dict(tensors), storage_writer=writer, planner=_Planner(parts), process_group=self._ranks.group)
        except CheckpointException as error:
            writer.discard()
            raise _translated(f"{self._directory.url(step)}: cannot be written", error) from error
        if self._ranks.rank == 0:
            seconds = time.perf_counter() - began
            self._on_saved(Saved(step, seconds if blocked is None else blocked, seconds))
            self._directory.tidy(self._keep)

    def _save_or_tell(self, snapshot: _Snapshot, began: float, blocked: float) -> None:
        try:
            self._save(snapshot, began, blocked)
        except CheckpointError as error:
            if self._ranks.rank == 0:
                self._on_failed(error)

    def _copied(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What this rank holds of the tensors, in host memory that is kept for the next time (pinned if they are on a
        device).
        """
        local = {name: _local(tensor) for name, tensor in tensors.items()}
        if self._stager is None:
            on_device = any(part.device.type != "cpu" for part in local.values())
            self._stager = DefaultStager(
                StagingOptions(
                    use_pinned_memory=on_device,
                    use_shared_memory=False,
                    use_async_staging=False,
                    use_non_blocking_copy=on_device,
                )
            )
        copied = self._stager.stage(local)
        assert isinstance(copied, dict)
        return copied

    def _examined(self, step: int, data: bytes) -> tuple[CheckpointRecord | None, list[str]]:
        """The record of a checkpoint and what is wrong with it or with its files, which the ranks share out; the same
        on every rank.
        """
        try:
            record = self._directory.decode(step, data)
        except ValueError as error:
            return None, [str(error)]
        # The largest first, in turn: each rank reads about as many bytes.
        names = sorted(record.files, key=lambda name: (-record.files[name].bytes, name))
        own = names[self._ranks.rank :: self._ranks.world_size]
        faults = self._ranks.all(functools.partial(self._directory.faults, record, own))
        return record, [fault for of_rank in faults for fault in of_rank]

    def _fill(self, record: CheckpointRecord, tensors: Mapping[str, Tensor], *, alone: bool = False) -> None:
        reader = FilesReader(self._directory.storage, self._directory.path(record.step), record)
        try:
            load(dict(tensors), storage_reader=reader, process_group=self._ranks.group, no_dist=alone)
        except CheckpointException as error:
            raise _translated(f"{self._directory.url(record.step)}: cannot be read", error) from error


class _Planner(DefaultSavePlanner):
    """Plans by the tensors themselves, and gives the copies of them to be written, where there are any."""

    def __init__(self, parts: Mapping[str, Tensor] | None) -> None:
        super().__init__()
        self._parts = parts

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        part = super().resolve_data(write_item) if self._parts is None else self._parts[write_item.index.fqn]
        assert isinstance(part, Tensor)
        return part


def _local(tensor: Tensor) -> Tensor:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.detach()


def _in_background(work: Callable[[], None]) -> Future[None]:
    """In a thread that does not hold up the end of the process: it may wait for a rank that is gone."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            work()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(None)

    threading.Thread(target=run, name="checkpoint", daemon=True).start()
    return future


def _translated(what: str, error: CheckpointException) -> CheckpointError:
    """One line: what went wrong on the first rank that failed."""
    rank, (cause, _) = min(error.failures.items())
    passes = all(may_pass(failure) for failure, _ in error.failures.values())
    return (CheckpointStorageError if passes else CheckpointError)(f"{what}: rank {rank}: {one_line(cause)}")
