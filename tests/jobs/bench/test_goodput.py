"""`blt bench goodput`: its arithmetic on timelines made by hand, and one small run of each way with real kills."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from blt.errors import ConfigError
from blt.optim import OptimizerConfig
from jobs.bench.circumstances import BenchResult
from jobs.bench.corpus import prose, write_corpus
from jobs.bench.goodput import GOALS, Config, GoodputResult, Told, figures_of, run
from jobs.bench.kills import WorkerProcess, kill_worker, worker_processes
from jobs.bench.recovery import compare, recovery_seconds, steps_for
from pipelines.manifest import read_manifest
from pipelines.train.account import account_of
from pipelines.train.config import TrainConfig
from pipelines.train.replicated import JOIN_TIMEOUT_MS
from pipelines.train.timeline import Event, Started, Step
from tests.model_cases import blt_config


def step(number: int, at: float, loss: float | None = 2.0, sequences: str = "", tries: int = 1) -> Step:
    """An update that took a second."""
    told = sequences or f"{number:x}"
    return Step(at=at, step=number, workers=3, sequences=told, loss=loss, seconds=1.0, tries=tries)


def steps(count: int) -> list[Step]:
    return [step(number, 100.0 + number) for number in range(1, count + 1)]


def told(*entries: Started | Step | Event) -> Told:
    return Told(account=account_of(entries), steps=tuple(entry for entry in entries if isinstance(entry, Step)))


@pytest.mark.parametrize(("seconds", "expected"), [(240.0, 480), (0.7, 1), (0.01, 1)])
def test_steps_fit_the_seconds_and_warming_up_does_not_count(seconds: float, expected: int) -> None:
    slow_start = [step(1, 10.0), step(2, 20.0), step(3, 20.5), step(4, 21.0), step(5, 21.5)]
    assert steps_for(seconds, slow_start, skip=1) == expected


def test_the_same_curve_may_tell_steps_twice() -> None:
    same = compare(steps(5), [*steps(3), *steps(5)[1:]])
    assert (same.same, same.largest_loss_difference, same.first_difference) == (True, 0.0, None)
    skipped = [step(1, 1.0, loss=None)]
    assert compare(skipped, skipped).same


@pytest.mark.parametrize(
    ("changed", "first"),
    [
        ([*steps(2), step(3, 1.0, sequences="other")], 3),
        ([*steps(1), step(2, 1.0, loss=2.0 * (1 + 1.1e-3)), *steps(3)], 2),  # though step 2 is right the second time
        ([*steps(2), step(3, 1.0, loss=None)], 3),
        ([*steps(2), step(3, 1.0, loss=float("nan"))], 3),
        (steps(2), 3),
        (steps(4), 4),
        ([], 1),
    ],
)
def test_another_curve_is_told_with_its_first_step(changed: list[Step], first: int) -> None:
    comparison = compare(steps(3), changed)
    assert (comparison.same, comparison.first_difference) == (False, first)


def test_a_loss_within_the_tolerance_is_the_same() -> None:
    comparison = compare(steps(1), [step(1, 1.0, loss=2.0 * (1 + 0.9e-3))])
    assert comparison.same
    assert comparison.largest_loss_difference == pytest.approx(0.9e-3)
    assert not compare([], []).same, "nothing was compared"


def test_two_restarts_and_what_they_cost() -> None:
    """Steps of a second; killed in step 3 (restarted from 1, 20 s), and in step 5 and again before it was done."""
    undisturbed = told(Started(at=90.0), *steps(6))
    disturbed = told(
        Started(at=90.0),
        *steps(2),
        Event(at=103.0, cause="failure"),
        step(2, 121.0),
        step(3, 122.0),
        step(4, 123.0),
        Event(at=124.0, cause="failure"),
        Event(at=130.0, cause="failure"),
        step(5, 140.0),
        step(6, 141.0),
    )
    figures = figures_of(undisturbed, disturbed, [102.5, 123.5, 129.0])
    assert figures["kills"] == 3
    assert (figures["undisturbed_seconds"], figures["disturbed_seconds"]) == (6.0, 41.0)
    assert figures["goodput"] == round(6 / 41, 4)
    assert (figures["steps_redone"], figures["tries_lost"], figures["steps_attempted"]) == (1, 0, 7)
    assert figures["steps_kept"] == round(6 / 7, 4)
    assert figures["recovery_seconds"] == {"median": 17.5, "max": 19.0, "kills": [19.0, 16.0]}
    assert figures["interruptions"] == {"failure": 2}


def test_a_try_that_was_given_up_counts_as_attempted() -> None:
    entries = [Started(at=90.0), *steps(2), step(3, 106.0, tries=2), Event(at=106.5, cause="failure")]
    figures = figures_of(told(*entries), told(*entries), [102.5])
    assert (figures["steps_redone"], figures["tries_lost"], figures["steps_attempted"]) == (0, 1, 4)
    assert figures["steps_kept"] == 0.75
    assert figures["recovery_seconds"]["kills"] == [3.0]


def test_without_kills_there_is_no_recovery() -> None:
    calm = told(Started(at=90.0), *steps(3))
    assert recovery_seconds(calm.account, calm.steps, []) == []
    figures = figures_of(calm, calm, [])
    assert (figures["goodput"], figures["steps_kept"]) == (1.0, 1.0)
    assert figures["recovery_seconds"] == {"median": None, "max": None, "kills": []}


def test_any_other_curve_makes_the_whole_incomplete() -> None:
    good = BenchResult(figures={"survival": "replicated"})
    bad = BenchResult(figures={"survival": "sharded"}, status="incomplete")
    result = GoodputResult(results=(bad, good))
    assert result.status == "incomplete"
    assert json.loads(result.to_json()) == {"status": "done", "survival": "replicated"}
    assert GoodputResult(results=(good,)).status == "done"


def test_settings_that_measure_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^every_seconds must be .* got 0"):
        Config(every_seconds=0)
    with pytest.raises(ConfigError, match=r"^undisturbed_seconds must be .* got inf"):
        Config(undisturbed_seconds=float("inf"))
    with pytest.raises(ConfigError, match=r"^workers and max_kills must be at least 1, got 0"):
        Config(workers=0)
    with pytest.raises(ConfigError, match=r"^workers and max_kills must be at least 1, got 3 and 0"):
        Config(max_kills=0)
    assert Config().modes == ("sharded", "replicated")
    assert Config(survival="sharded").modes == ("sharded",)


def test_kills_end_where_they_come_faster_than_a_run_recovers() -> None:
    assert Config(undisturbed_seconds=100.0, every_seconds=10.0).most_kills == 40
    assert Config(undisturbed_seconds=1.0, every_seconds=10.0).most_kills == 1
    assert Config(max_kills=2).most_kills == 2


def test_words_are_the_same_for_a_seed_and_make_both_splits(tmp_path: Path) -> None:
    texts = prose(1, 12, 300)
    assert texts == prose(1, 12, 300) != prose(2, 12, 300)
    assert [len(text) for text in texts] == [300] * 12
    write_corpus(str(tmp_path), texts[2:], 3000, 2, valid=texts[:2])
    manifest = read_manifest(str(tmp_path))
    assert [shard.split for shard in manifest.shards] == ["train", "train", "valid"]
    assert (manifest.documents, manifest.bytes) == (12, 3600)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_local")
def test_only_training_workers_are_killed() -> None:
    import ray

    node = ray.get_runtime_context().get_node_id()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        stranger = WorkerProcess(actor="", node=node, pid=other.pid, began=0)
        assert not kill_worker(stranger)
        assert other.poll() is None
        other.communicate(b"\n")
    assert not kill_worker(stranger), "it is gone"
    assert worker_processes() == []


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_local")
@pytest.mark.timeout(400)  # about a minute on two idle cores
def test_a_run_with_kills_has_the_curve_of_one_without() -> None:
    """What sharded workers do after a death is in tests/pipelines/train/test_survival.py."""
    train = TrainConfig(
        steps=1,
        global_batch=6,
        micro_batch=2,
        sequence_bytes=256,
        sequence_patches=64,
        optimizer=OptimizerConfig(lr=1e-3, warmup_steps=5),
        checkpoint_every=20,
        valid_every=50,
        valid_sequences=4,
    )
    config = Config(
        survival="replicated",
        every_seconds=0.2,  # at the first step that is told of: on a busy machine the run may be a short one
        undisturbed_seconds=10.0,
        max_kills=1,  # the next would come before the run has recovered
        train=train,
        model=blt_config(),
    )
    result = run(config)
    line = result.to_json()
    assert "\n" not in line
    figures = json.loads(line)
    assert (figures["status"], figures["survival"], figures["same_curve"]) == ("done", "replicated", True)
    assert figures["goals"] == GOALS["replicated"]
    assert (figures["kills"], figures["kills_ran_out"]) == (1, True)
    assert figures["interruptions"].get("failure", 0) >= 1
    assert figures["goodput"] == round(figures["undisturbed_seconds"] / figures["disturbed_seconds"], 4)
    assert figures["steps_attempted"] == figures["steps"] + figures["steps_redone"] + figures["tries_lost"]
    assert figures["steps_kept"] == round(figures["steps"] / figures["steps_attempted"], 4)
    assert len(figures["recovery_seconds"]["kills"]) == 1
    assert figures["configuration"]["train"]["steps"] == figures["steps"]
    assert figures["steps_redone"] == 0
    # No survivor waited for another that waited for the first.
    assert figures["recovery_seconds"]["max"] < JOIN_TIMEOUT_MS / 2000
