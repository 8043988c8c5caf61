"""The directory with a run's checkpoints, as one process sees it: which are whole, which are sound, which must go.

In: a storage and a run's name. Out: records of checkpoints, lines that say what is broken. Of several processes that
work on it at the same time (ranks, replica groups, a driver) each finds whole checkpoints only.
"""

import contextlib
import functools
import logging
import os
import re
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from torch import Tensor

from blt.errors import BltError, CheckpointError
from pipelines.storage import Storage
from pipelines.train.checkpoint_files import THREADS, remove_files
from pipelines.train.checkpoint_ranks import one_line
from pipelines.train.checkpoint_record import RECORD_NAME, CheckpointRecord, decode_record

logger = logging.getLogger(__name__)

CHECKPOINTS_NAME = "checkpoints"
BROKEN_NAME = "broken.json"
"""What the record of a broken checkpoint becomes."""
LEFTOVER_SECONDS = 900.0
"""What nobody has written to for so long was left by a killed save; one request of a live one takes less."""


class CheckpointDirectory:
    """checkpoints/RUN/step-N below the root of `storage`; every method raises what storage does."""

    def __init__(self, storage: Storage, run: str) -> None:
        self.storage, self._run = storage, run
        self._root = f"{CHECKPOINTS_NAME}/{run}"

    def path(self, step: int, name: str = "") -> str:
        """Of a checkpoint, or a file of it, below the root of the storage."""
        return f"{self._root}/step-{step:08d}" + (f"/{name}" if name else "")

    def url(self, step: int | None = None, name: str = "") -> str:
        """For a person; of the whole directory without a step."""
        return self.storage.url(self._root if step is None else self.path(step, name))

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, newest first."""
        return _whole(self._files())

    def newest(self, but: Container[int] = ()) -> tuple[int, bytes] | None:
        """The newest whole checkpoint whose step is not among `but`, and its record as it lies there."""
        for step in self.steps():
            if step not in but:
                with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                    return step, self.record_bytes(step)
        return None

    def broken_records(self) -> list[str]:
        """What `set_aside` made of the records of broken checkpoints, newest first, below the directory."""
        files = self._files()
        return [f"step-{step:08d}/{BROKEN_NAME}" for step in sorted(files, reverse=True) if BROKEN_NAME in files[step]]

    def record_bytes(self, step: int) -> bytes:
        return self.storage.read_bytes(self.path(step, RECORD_NAME))

    def decode(self, step: int, data: bytes) -> CheckpointRecord:
        """The record of a checkpoint. ValueError naming the file if it is broken."""
        try:
            return decode_record(data)
        except ValueError as error:
            raise ValueError(f"{self.url(step, RECORD_NAME)}: {error}") from error

    def faults(self, record: CheckpointRecord, names: Iterable[str]) -> list[str]:
        """What is wrong with these files of a checkpoint, a line for each that is; every byte is read."""
        with ThreadPoolExecutor(THREADS, thread_name_prefix="checkpoint-verify") as pool:
            found = pool.map(functools.partial(self._fault, record), names)
            return [fault for fault in found if fault is not None]

    def check_fit(self, record: CheckpointRecord, tensors: Mapping[str, Tensor]) -> None:
        """CheckpointError unless the checkpoint is this run's and holds these tensors in their shapes."""
        url = self.url(record.step)
        if record.run != self._run:
            raise CheckpointError(f"{url}: belongs to another run ({record.run}, not {self._run})")
        for name, tensor in tensors.items():
            stored = record.tensors.get(name)
            if stored is None:
                raise CheckpointError(f"{url}: holds no tensor {name}")
            if stored.shape != tuple(tensor.shape):
                raise CheckpointError(f"{url}: {name} has shape {list(stored.shape)}, not {list(tensor.shape)}")

    def holds(self, step: int, data: bytes) -> bool:
        """Whether the record of a checkpoint is there and is `data`."""
        try:
            return self.record_bytes(step) == data
        except FileNotFoundError:
            return False

    def set_aside(self, step: int, data: bytes) -> None:
        """Make a broken checkpoint one that is not whole, unless it was replaced since its record was read (`data`)."""
        if self.holds(step, data):
            self.storage.write_replace(self.path(step, BROKEN_NAME), data)
            self.storage.delete(self.path(step, RECORD_NAME))

    def tidy(self, keep: int, *, alone: bool = False) -> None:
        """Once a save is whole: remove all but the `keep` newest checkpoints, and what saves that were cut off left.

        alone: nobody saves meanwhile, so the newest may be rid of files that its record does not name; else another
        replica may be about to save the same step. A failure is logged: the next time does it.
        """
        try:
            files = self._files()
            for step in _outdated(files, keep):
                self._remove(step, files[step])
                self._remove_directory(step)
            for step in _whole(files):
                if BROKEN_NAME in files[step]:  # it was made again
                    self.storage.delete(self.path(step, BROKEN_NAME))
            if alone and (newest := next(iter(_whole(files)), None)) is not None:
                named = self.decode(newest, self.record_bytes(newest)).files
                self._remove(newest, set(files[newest]) - {RECORD_NAME, *named})
            self.storage.remove_leftovers(self.storage.leftovers(LEFTOVER_SECONDS))
        except (BltError, OSError, ValueError) as error:
            logger.warning("old checkpoints stay for now: %s", one_line(error))

    def _files(self) -> dict[int, list[str]]:
        """Names of the files of each checkpoint, whole or not."""
        found: dict[int, list[str]] = {}
        for path in self.storage.list(self._root):
            if match := re.fullmatch(r"step-(\d+)/([^/]+)", path.removeprefix(f"{self._root}/")):
                found.setdefault(int(match[1]), []).append(match[2])
        return found

    def _fault(self, record: CheckpointRecord, name: str) -> str | None:
        path, expected = self.path(record.step, name), record.files[name]
        try:
            if self.storage.sha256(path) == expected.sha256:
                return None
            size = self.storage.sizes(self.path(record.step)).get(path)
        except FileNotFoundError:
            return f"{self.storage.url(path)}: is missing"
        how = f"holds {size} bytes, not {expected.bytes}" if size != expected.bytes else "has changed"
        return f"{self.storage.url(path)}: {how} since it was written"

    def _remove(self, step: int, names: Collection[str]) -> None:
        if RECORD_NAME in names:  # first: what is half gone must not look whole
            self.storage.delete(self.path(step, RECORD_NAME))
        remove_files(self.storage, (self.path(step, name) for name in names))

    def _remove_directory(self, step: int) -> None:
        if self.storage.is_local:
            with contextlib.suppress(OSError):  # a late file of a save that is not known here: it stays
                os.rmdir(self.url(step))


def _whole(files: Mapping[int, Sequence[str]]) -> list[int]:
    """Steps with a record, newest first."""
    return sorted((step for step, names in files.items() if RECORD_NAME in names), reverse=True)


def _outdated(files: Mapping[int, Sequence[str]], keep: int) -> list[int]:
    """Steps of checkpoints that are to go: old ones, and those that did not get whole.

    Of the latter only what is older than the second newest whole one. Where another worker saves too (the first of the
    replica groups changes), its save may be under way still, but hardly for the length of two checkpoints.
    """
    whole = _whole(files)
    border = whole[1] if len(whole) > 1 else 0
    return [step for step in files if step in whole[keep:] or (step not in whole and step < border)]
