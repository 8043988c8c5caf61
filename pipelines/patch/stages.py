"""Three stages at work at once: one thread reads ahead, the caller's thread infers, one thread writes.

In: an iterator to read from, a function of one item, a function that consumes what it makes. Out: what the consumer
returns, and the seconds that each stage was busy. At most `depth` items wait between two stages, so memory is bounded.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

import msgspec

Read = TypeVar("Read")
Made = TypeVar("Made")
Result = TypeVar("Result")
Item = TypeVar("Item")


class StageSeconds(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Wall-clock seconds of one piece of work, and how long each stage was busy meanwhile; stages overlap."""

    reading: float = 0.0
    inferring: float = 0.0
    writing: float = 0.0
    total: float = 0.0
    """From start to end; what inferring does not fill was spent waiting for the other two."""


class _AbandonedError(Exception):
    """Another stage failed: there is nothing left to do."""


class _Handover(Generic[Item]):
    """A bounded queue from one thread to another."""

    def __init__(self, depth: int) -> None:
        self._items: deque[Item] = deque()
        self._depth = depth
        self._ended = self._abandoned = False
        self._changed = threading.Condition()
        self.starved_seconds = 0.0
        """How long the receiving side has waited."""

    def put(self, item: Item) -> None:
        """Hand an item over, waiting for room; _AbandonedError if nobody will take it."""
        with self._changed:
            self._changed.wait_for(lambda: self._abandoned or len(self._items) < self._depth)
            if self._abandoned:
                raise _AbandonedError
            self._items.append(item)
            self._changed.notify_all()

    def end(self) -> None:
        """Nothing comes after what was put."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def abandon(self) -> None:
        """Let neither side wait any more."""
        with self._changed:
            self._abandoned = True
            self._items.clear()
            self._changed.notify_all()

    def __iter__(self) -> Iterator[Item]:
        while True:
            with self._changed:
                began = time.perf_counter()
                self._changed.wait_for(lambda: self._abandoned or self._ended or self._items)
                self.starved_seconds += time.perf_counter() - began
                if self._abandoned:
                    raise _AbandonedError
                if not self._items:
                    return
                item = self._items.popleft()
                self._changed.notify_all()
            yield item


class _Stages(Generic[Read, Made]):
    """The two queues of one run, the failures of its stages in the order of time, and their seconds."""

    def __init__(self, depth: int) -> None:
        self.read: _Handover[Read] = _Handover(depth)
        self.made: _Handover[Made] = _Handover(depth)
        self.failures: list[BaseException] = []
        self.reading = self.inferring = self.writing = 0.0

    def run(self, stage: Callable[[], Result]) -> Result:
        """Run one stage; its failure ends the others. _AbandonedError if another one failed."""
        try:
            return stage()
        except _AbandonedError:
            raise
        except BaseException as error:
            self.failures.append(error)
            self.read.abandon()
            self.made.abandon()
            raise _AbandonedError from None

    def read_ahead(self, items: Iterator[Read]) -> None:
        while True:
            began = time.perf_counter()
            try:
                item = next(items)
            except StopIteration:
                break
            finally:
                self.reading += time.perf_counter() - began
            self.read.put(item)
        self.read.end()

    def infer(self, work: Callable[[Read], Made]) -> None:
        for item in self.read:
            began = time.perf_counter()
            made = work(item)
            self.inferring += time.perf_counter() - began
            self.made.put(made)
        self.made.end()

    def write(self, consume: Callable[[Iterator[Made]], Result]) -> Result:
        began = time.perf_counter()
        result = consume(iter(self.made))
        self.writing += time.perf_counter() - began - self.made.starved_seconds
        return result


def run_stages(
    items: Iterator[Read], work: Callable[[Read], Made], consume: Callable[[Iterator[Made]], Result], *, depth: int = 1
) -> tuple[Result, StageSeconds]:
    """Read `items` on one thread, make `work(item)` of each on this one, and `consume` them in order on another.

    `consume` must exhaust its iterator. The first failure of any stage is raised as it is, after all threads have
    ended; meanwhile the iterator that `consume` reads raises, so that its own clean-up runs.
    """
    began = time.perf_counter()
    stages: _Stages[Read, Made] = _Stages(depth)
    with ThreadPoolExecutor(2, thread_name_prefix="patch-stage") as threads:
        reading = threads.submit(stages.run, lambda: stages.read_ahead(items))
        writing = threads.submit(stages.run, lambda: stages.write(consume))
        try:
            stages.run(lambda: stages.infer(work))
            reading.result()
            result = writing.result()
        except _AbandonedError:
            raise stages.failures[0] from None
    seconds = StageSeconds(
        reading=stages.reading,
        inferring=stages.inferring,
        writing=stages.writing,
        total=time.perf_counter() - began,
    )
    return result, seconds
