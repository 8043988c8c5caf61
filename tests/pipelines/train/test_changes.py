"""What a worker knows of announced changes: requests, answers, and how long it stands still."""

import threading

import pytest

from pipelines.train import changes
from pipelines.train.changes import Changes, PreemptedError


class Announced(Changes):
    """With a cluster that announces the loss of a node, or not."""

    def __init__(self, node_goes: bool = False) -> None:
        super().__init__()
        self.node_goes = node_goes

    def node_will_go(self) -> bool:
        return self.node_goes


def held(worker: Announced, saved: bool) -> threading.Thread:
    thread = threading.Thread(target=worker.hold, args=(saved,), daemon=True)
    thread.start()
    return thread


def test_a_request_is_answered_once_it_is_saved() -> None:
    worker = Announced()
    assert not worker.save_is_requested()
    worker.request_save()
    assert worker.save_is_requested()
    assert not worker.wait_until_saved(0.01), "nothing was saved yet"
    held(worker, True)
    assert worker.wait_until_saved(10)
    assert not worker.save_is_requested()


def test_a_request_that_comes_when_the_worker_stands_still_already_is_answered_too() -> None:
    """The save was asked for by another rank's request, which was there first."""
    worker = Announced()
    held(worker, True)
    assert worker.wait_until_saved(10)
    worker.request_save()
    assert not worker.save_is_requested()
    assert worker.wait_until_saved(0.01)


def test_a_save_that_failed_is_told_and_the_worker_goes_on() -> None:
    worker = Announced()
    worker.request_save()
    answers: list[bool] = []
    asking = threading.Thread(target=lambda: answers.append(worker.wait_until_saved(10)))
    asking.start()
    worker.hold(saved=False)
    asking.join()
    assert answers == [False]


def test_a_run_that_is_over_keeps_nobody_waiting() -> None:
    worker = Announced()
    worker.finish()
    worker.request_save()
    assert worker.wait_until_saved(0.01)


def test_a_change_that_does_not_come_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "SECONDS_TO_SAVE", 0.05)
    worker = Announced()
    worker.hold(saved=True)
    worker.request_save()
    assert worker.save_is_requested()
    assert not worker.wait_until_saved(0.01), "the next request is a new one"


@pytest.mark.parametrize(("saved", "says"), [(True, "all workers have saved"), (False, "the checkpoint for it failed")])
def test_before_a_node_goes_the_worker_leaves(saved: bool, says: str) -> None:
    worker = Announced(node_goes=True)
    assert worker.save_is_requested()
    with pytest.raises(PreemptedError, match=says):
        worker.hold(saved)
