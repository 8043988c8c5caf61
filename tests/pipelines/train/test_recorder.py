"""The recorder: a step counts once whoever tells of it, and again when it was done again."""

from pathlib import Path

import pytest

from pipelines.train.metrics import StepRecord, read_metrics
from pipelines.train.recorder import Recorder, RecorderConfig
from pipelines.train.timeline import Step, read_timeline
from tests.s3_server import S3Server

PEAK = 1e9


def config(output: str, **changes: int) -> RecorderConfig:
    values = {"log_every": 2, "checkpoint_every": 5, "steps": 6, **changes}
    return RecorderConfig(output=output, run="r", flops_per_byte=100.0, **values)


def record(step: int, nats: float = 100.0, seconds: float = 0.5, workers: int = 1) -> StepRecord:
    return StepRecord(
        step=step,
        workers=workers,
        nats=nats,
        targets=50,
        bytes=40,
        patches=10,
        grad_norm=1.0,
        lr=1e-3,
        sequences=f"{step:016x}",
        seconds=seconds,
        waited_seconds=0.05,
        paused_seconds=0.0,
        tries=1,
        peak_memory_bytes=7,
    )


def steps_of(output: Path) -> list[int]:
    return [int(one["step"]) for one in read_metrics(output)]


def test_records_close_at_borders_and_checkpoints(tmp_path: Path) -> None:
    recorder = Recorder(config(str(tmp_path)))
    recorder.joined("a", 0, PEAK)
    for step in range(1, 7):
        recorder.step("a", record(step))
    recorder.close()
    assert steps_of(tmp_path) == [2, 4, 5, 6]
    first = read_metrics(tmp_path)[0]
    assert (first["train/loss"], first["train/bytes"], first["train/step_seconds"]) == (2.0, 80, 0.5)
    assert (first["train/bytes_per_second"], first["train/patches_per_second"]) == (80.0, 20.0)
    assert (first["train/data_wait_fraction"], first["train/mfu"]) == (pytest.approx(0.1), 100.0 * 80 / PEAK)


def test_a_step_that_two_workers_tell_of_counts_once(tmp_path: Path) -> None:
    recorder = Recorder(config(str(tmp_path), log_every=1))
    for worker in "ab":
        recorder.joined(worker, 0, PEAK)
    for step in (1, 2):
        for worker in "ab":
            recorder.step(worker, record(step, workers=2))
    recorder.close()
    assert steps_of(tmp_path) == [1, 2]
    assert read_metrics(tmp_path)[0]["train/mfu"] == 100.0 * 40 / 0.5 / (2 * PEAK)


def test_workers_arrive_once_each_in_their_group(tmp_path: Path) -> None:
    recorder = Recorder(config(str(tmp_path)))
    assert [recorder.arrived(worker) for worker in "aabac"] == [1, 1, 2, 2, 3]
    recorder.group_begins()
    assert [recorder.arrived(worker) for worker in "de"] == [1, 2]


def test_steps_done_again_by_a_later_worker_replace_the_first(tmp_path: Path) -> None:
    recorder = Recorder(config(str(tmp_path), log_every=1))
    recorder.joined("a", 0, PEAK)
    for step in (1, 2, 3, 4):
        recorder.step("a", record(step))
    recorder.joined("b", 2, PEAK)
    recorder.event("failure", "worker a died")
    for step in (3, 4, 5):
        recorder.step("b", record(step, nats=200.0))
    assert [one["train/loss"] for one in read_metrics(tmp_path)] == [2.0, 2.0, 4.0, 4.0, 4.0]
    account = recorder.account()
    assert (account.steps, account.steps_redone, account.interruptions[0].cause) == (5, 2, "failure")
    told = [entry.step for entry in read_timeline(str(tmp_path)) if isinstance(entry, Step)]
    assert told == [1, 2, 3, 4, 3, 4, 5]


def test_a_recorder_that_comes_back_goes_on_where_the_run_stands(tmp_path: Path) -> None:
    """The first one got to step 4; the run goes on from its checkpoint after step 2."""
    first = Recorder(config(str(tmp_path), log_every=1))
    first.joined("a", 0, PEAK)
    for step in (1, 2, 3, 4):
        first.step("a", record(step))
    second = Recorder(config(str(tmp_path), log_every=1))
    second.joined("b", 2, PEAK)
    second.step("b", record(3, nats=200.0))
    second.evaluated(3, {"valid/bpb": 2.0})
    second.evaluated(3, {"valid/bpb": 2.0})
    second.close()
    assert [(one["step"], one.get("train/loss")) for one in read_metrics(tmp_path)] == [
        (1, 2.0),
        (2, 2.0),
        (3, 4.0),
        (3, None),
    ]


def test_a_checkpoint_has_a_record_of_its_own(tmp_path: Path) -> None:
    """It is whole some steps after its own; when those are done again, it stays."""
    recorder = Recorder(config(str(tmp_path), log_every=1))
    recorder.joined("a", 0, PEAK)
    for step in (1, 2, 3):
        recorder.step("a", record(step))
    recorder.saved(2, 0.25, 1.5)
    recorder.joined("b", 2, PEAK)
    recorder.step("b", record(3, nats=200.0))
    records = read_metrics(tmp_path)
    assert [one["step"] for one in records] == [1, 2, 2, 3]
    assert records[2] == {"step": 2, "train/checkpoint_seconds": 1.5, "train/checkpoint_blocked_seconds": 0.25}
    assert records[3]["train/loss"] == 4.0


def test_every_record_tells_of_the_interruptions_so_far(tmp_path: Path) -> None:
    """As many as in the account of the run, those before its command was started again included."""
    first = Recorder(config(str(tmp_path), log_every=1))
    first.event("failure", "before the first step nothing is interrupted")
    first.joined("a", 0, PEAK)
    for step in (1, 2):
        first.step("a", record(step))
    first.event("failure", "worker a died")
    first.event("shrink", "part of the same interruption")
    first.joined("b", 2, PEAK)
    for step in (3, 4):
        first.step("b", record(step))
    second = Recorder(config(str(tmp_path), log_every=1))
    second.started()
    second.joined("c", 4, PEAK)
    for step in (5, 6):
        second.step("c", record(step))
    second.close()
    assert [one["train/interruptions"] for one in read_metrics(tmp_path)] == [0, 0, 1, 1, 2, 2]
    assert [one.cause for one in second.account().interruptions] == ["failure", "restart"]


def test_new_records_can_be_followed(tmp_path: Path) -> None:
    recorder = Recorder(config(str(tmp_path), log_every=1))
    recorder.joined("a", 0, PEAK)
    assert recorder.records_since(0) == ([], 0)
    recorder.step("a", record(1))
    records, seen = recorder.records_since(0)
    assert ([one["step"] for one in records], seen) == ([1], 1)
    assert recorder.records_since(seen) == ([], 1)


def test_new_events_can_be_followed(tmp_path: Path) -> None:
    recorder = Recorder(config(str(tmp_path)))
    assert recorder.events_since(0) == ([], 0)
    recorder.event("failure", "worker 1: gone")
    (event,), seen = recorder.events_since(0)
    assert (event.cause, event.detail, seen) == ("failure", "worker 1: gone", 1)
    assert recorder.events_since(seen) == ([], 1)


def test_failures_count_until_a_new_step_is_made(tmp_path: Path) -> None:
    recorder = Recorder(config(str(tmp_path)))
    recorder.joined("a", 0, PEAK)
    for step in (1, 2):
        recorder.step("a", record(step))
    for cause in ("failure", "preemption", "hang"):
        recorder.event(cause)
    assert recorder.failures() == 2
    recorder.joined("b", 1, PEAK)
    recorder.step("b", record(2))  # made again
    assert recorder.failures() == 2
    recorder.step("b", record(3))
    assert recorder.failures() == 0


def test_what_could_not_be_recorded_is_told_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for an answer to what is told."""
    recorder = Recorder(config(str(tmp_path)))
    recorder.joined("a", 0, PEAK)
    assert recorder._fault is None

    def full(entry: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(recorder._timeline, "write", full)
    with pytest.raises(OSError, match="No space left"):
        recorder.step("a", record(1))
    monkeypatch.undo()
    recorder.step("a", record(1))
    assert recorder.close() == "step: [Errno 28] No space left on device"


def test_the_first_fatal_fault_stays(tmp_path: Path) -> None:
    recorder = Recorder(config(str(tmp_path)))
    assert recorder.failure() is None
    recorder.fail("one")
    recorder.fail("two")
    assert recorder.failure() == "one"


@pytest.mark.s3
def test_a_run_on_s3_is_stored_with_its_checkpoints_and_goes_on(s3: S3Server) -> None:
    output = s3.url("recorder/run")
    first = Recorder(config(output, log_every=1))
    first.joined("a", 0, PEAK)
    first.step("a", record(1))
    first.saved(1, 0.1, 0.2)
    first.step("a", record(2))  # told, but its recorder dies before the next checkpoint
    assert [(one["step"], one.get("train/checkpoint_seconds")) for one in read_metrics(output)] == [(1, None), (1, 0.2)]
    second = Recorder(config(output, log_every=1))
    second.joined("b", 1, PEAK)
    second.step("b", record(2, nats=200.0))
    second.close()
    losses = [(one["step"], one["train/loss"]) for one in read_metrics(output) if "train/loss" in one]
    assert losses == [(1, 2.0), (2, 4.0)]
    assert [entry.step for entry in read_timeline(output) if isinstance(entry, Step)] == [1, 2]
