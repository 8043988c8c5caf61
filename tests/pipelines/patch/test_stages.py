"""Three stages at once: order, bounds, and the first failure of any of them, with every thread gone afterwards."""

import itertools
import threading
from collections.abc import Iterator

import pytest

from pipelines.patch.stages import run_stages


class BrokenError(Exception):
    pass


def _threads() -> int:
    return sum(thread.name.startswith("patch-stage") for thread in threading.enumerate())


def test_everything_comes_out_in_order() -> None:
    made, seconds = run_stages(iter(range(100)), lambda number: number * 2, list)
    assert made == list(range(0, 200, 2))
    assert seconds.total >= max(seconds.reading, seconds.inferring, seconds.writing) >= 0
    assert _threads() == 0


def test_nothing_in_nothing_out() -> None:
    made, _ = run_stages(iter(()), str, list)
    assert made == []


def test_the_stages_work_at_the_same_time() -> None:
    """Each stage waits for both others inside its own step: a run of one stage after the other would never end."""
    together = threading.Barrier(3, timeout=20)

    def read() -> Iterator[int]:
        for number in range(4):
            if number == 3:  # the fourth is read while the third is worked on and the second written
                together.wait()
            yield number

    def work(number: int) -> int:
        if number == 2:
            together.wait()
        return number

    def write(numbers: Iterator[int]) -> list[int]:
        taken = []
        for number in numbers:
            if number == 1:
                together.wait()
            taken.append(number)
        return taken

    made, _ = run_stages(read(), work, write)
    assert made == [0, 1, 2, 3]


@pytest.mark.parametrize("depth", [1, 3])
def test_a_slow_writer_holds_the_reader_back(depth: int) -> None:
    """With nothing written, each queue fills, and each stage has one item in its hands."""
    read: list[int] = []
    stalled = threading.Event()
    most = 2 * depth + 3

    def numbers() -> Iterator[int]:
        for number in range(50):
            read.append(number)
            if len(read) == most:
                stalled.set()
            yield number

    def write(items: Iterator[int]) -> int:
        next(items)
        assert stalled.wait(20), "the reader should get this far"
        assert len(read) <= most
        return 1 + sum(1 for _ in items)

    assert run_stages(numbers(), lambda number: number, write, depth=depth)[0] == 50


def test_a_failure_of_the_reader_is_raised_as_it_is() -> None:
    cleaned: list[str] = []

    def read() -> Iterator[int]:
        yield 1
        raise BrokenError("reader")

    def write(items: Iterator[int]) -> None:
        try:
            for _ in items:
                pass
        except Exception:
            cleaned.append("discarded")
            raise

    with pytest.raises(BrokenError, match="reader"):
        run_stages(read(), lambda number: number, write)
    assert cleaned == ["discarded"]
    assert _threads() == 0


def test_a_failure_of_inference_stops_both_others() -> None:
    def work(number: int) -> int:
        raise BrokenError("inference")

    with pytest.raises(BrokenError, match="inference"):
        run_stages(itertools.count(), work, list)
    assert _threads() == 0


def test_a_failure_of_the_writer_stops_an_endless_reader() -> None:
    def write(items: Iterator[int]) -> None:
        next(items)
        raise BrokenError("disk full")

    with pytest.raises(BrokenError, match="disk full"):
        run_stages(itertools.count(), lambda number: number, write)
    assert _threads() == 0


def test_an_interrupt_ends_the_threads() -> None:
    def work(number: int) -> int:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stages(itertools.count(), work, list)
    assert _threads() == 0
