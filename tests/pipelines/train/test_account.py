"""The account of a run from its timeline: what was redone, what it cost and why."""

import dataclasses

import pytest

from pipelines.train.account import Account, account_of
from pipelines.train.timeline import AnyEntry, Event, Joined, Saved, Started, Step


def step(
    number: int, at: float, *, seconds: float = 1.0, paused: float = 0.0, tries: int = 1, workers: int = 2
) -> Step:
    return Step(
        at=at,
        step=number,
        workers=workers,
        sequences="0f",
        loss=1.0,
        seconds=seconds,
        paused_seconds=paused,
        tries=tries,
    )


def steps(first: int, last: int, at: float) -> list[AnyEntry]:
    """One a second, the first of them begun at `at`."""
    return [step(number, at + 1 + number - first) for number in range(first, last + 1)]


def test_an_undisturbed_run_has_goodput_1() -> None:
    account = account_of([Started(at=0.0), Joined(at=9.0, worker="a", step=0), *steps(1, 10, 10.0)])
    expected = Account(
        steps=10,
        steps_redone=0,
        tries_lost=0,
        seconds=10.0,
        seconds_lost=0.0,
        startup_seconds=10.0,
        checkpoints=0,
        checkpoint_blocked_seconds=0.0,
        interruptions=(),
    )
    assert account == expected
    assert (account.goodput, account.steps_kept) == (1.0, 1.0)


def test_evaluation_and_checkpoint_are_no_loss() -> None:
    saved = Saved(at=5.0, step=2, blocked_seconds=0.5, seconds=2.0)
    account = account_of([*steps(1, 2, 0.0), saved, step(3, 9.0, paused=6.0)])
    assert (account.seconds, account.seconds_lost, account.goodput) == (9.0, 0.0, 1.0)
    assert (account.checkpoints, account.checkpoint_blocked_seconds) == (1, 0.5)


def test_a_rollback_counts_the_restart_and_the_steps_done_again() -> None:
    """Died after step 10, back at step 8 after 20 s: 20 s of restart and two steps done again."""
    failure = Event(at=11.0, cause="failure", detail="worker 1 died")
    account = account_of([*steps(1, 10, 0.0), failure, *steps(9, 15, 30.0)])
    assert (account.steps, account.steps_redone, account.seconds) == (15, 2, 37.0)
    (one,) = account.interruptions
    assert dataclasses.asdict(one) == {
        "cause": "failure",
        "detail": "worker 1 died",
        "step": 10,
        "steps_redone": 2,
        "tries_lost": 0,
        "seconds_lost": 22.0,
    }
    assert account.goodput == pytest.approx(15 / 37)
    assert account.steps_kept == pytest.approx(15 / 17)


def test_a_try_that_was_given_up_takes_the_cause_that_is_told_after_it() -> None:
    late = Event(at=8.5, cause="failure", detail="replica 2 died")
    account = account_of([*steps(1, 5, 0.0), step(6, 7.5, tries=2), late, *steps(7, 9, 7.5)])
    (one,) = account.interruptions
    assert (one.cause, one.detail, one.step) == ("failure", "replica 2 died", 5)
    assert (one.steps_redone, one.tries_lost, one.seconds_lost) == (0, 1, 1.5)
    assert account.seconds_lost == 1.5
    assert account.steps_kept == pytest.approx(9 / 10)


def test_a_worker_lost_between_two_steps_is_an_interruption_before_its_cause_is_told() -> None:
    """It was waited for, and no try was lost. That its replacement comes is none."""
    found = [*steps(1, 5, 0.0), step(6, 7.5, workers=1), step(7, 8.5, workers=1), step(8, 9.5)]
    (one,) = account_of(found).interruptions
    assert (one.cause, one.step, one.steps_redone, one.tries_lost, one.seconds_lost) == ("aborted", 5, 0, 0, 1.5)
    (one,) = account_of([*found, Event(at=27.0, cause="hang", detail="worker 1")]).interruptions
    assert (one.cause, one.detail, one.seconds_lost) == ("hang", "worker 1", 1.5)


def test_a_command_started_again_is_an_interruption_unless_a_cause_is_known() -> None:
    again = [*steps(1, 4, 0.0), Started(at=50.0), *steps(5, 6, 60.0)]
    (one,) = account_of(again).interruptions
    assert (one.cause, one.seconds_lost, one.steps_redone) == ("restart", 56.0, 0)
    (one,) = account_of([*again[:4], Event(at=4.5, cause="hang", detail="worker 0"), *again[4:]]).interruptions
    assert (one.cause, one.detail) == ("hang", "worker 0")


def test_the_last_step_done_again_counts_too() -> None:
    account = account_of([*steps(1, 4, 0.0), Event(at=4.0, cause="failure"), *steps(3, 4, 10.0)])
    assert (account.steps, account.steps_redone, account.seconds, account.seconds_lost) == (4, 2, 12.0, 8.0)


def test_a_run_that_never_made_a_step_has_an_account() -> None:
    account = account_of([Started(at=1.0), Event(at=2.0, cause="failure"), Started(at=3.0)])
    assert (account.steps, account.seconds, account.goodput, account.steps_kept) == (0, 0.0, 1.0, 1.0)
