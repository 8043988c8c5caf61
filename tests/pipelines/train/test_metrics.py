"""Metrics of a run on disk: a step stands there once, whatever was interrupted."""

import functools
import json
import re
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipelines.train.metrics import (
    FIGURES,
    METRICS_NAME,
    TENSORBOARD_NAME,
    MetricsWriter,
    peak_memory_bytes,
    read_metrics,
)
from pipelines.train.trainer import train
from tests.metrics_page import wait_for_figures
from tests.pipelines.train.tiny_run import tiny_job, write_tiny_patches


def scalars(run_directory: Path, name: str) -> list[tuple[int, float]]:
    """What TensorBoard shows."""
    events = EventAccumulator(str(run_directory / TENSORBOARD_NAME))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_records_come_back_in_order(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "run") as metrics:
        metrics.write(1, {"train/loss": 2.5, "train/lr": 1e-3})
        metrics.write(2, {"train/loss": 2.25, "train/lr": 1e-3})
        metrics.write(2, {"valid/bpb": 3.0})
    assert read_metrics(tmp_path / "run") == [
        {"step": 1, "train/loss": 2.5, "train/lr": 1e-3},
        {"step": 2, "train/loss": 2.25, "train/lr": 1e-3},
        {"step": 2, "valid/bpb": 3.0},
    ]
    assert scalars(tmp_path / "run", "train/loss") == [(1, 2.5), (2, 2.25)]
    assert scalars(tmp_path / "run", "valid/bpb") == [(2, 3.0)]


def test_records_can_be_followed_while_they_are_written(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    with MetricsWriter(tmp_path) as metrics:
        assert read_metrics(tmp_path) == []
        metrics.write(1, {"train/loss": 2.5})
        assert read_metrics(tmp_path) == [{"step": 1, "train/loss": 2.5}]


@pytest.mark.parametrize("half", ['{"step": 3', '{"step": 3, "train/loss": 1.0}', ""])
def test_a_half_written_line_is_left_out(tmp_path: Path, half: str) -> None:
    """A line counts once its end is there; the next writer starts on a line of its own."""
    (tmp_path / METRICS_NAME).write_text('{"step": 1, "train/loss": 2.5}\n' + half, encoding="utf-8")
    assert read_metrics(tmp_path) == [{"step": 1, "train/loss": 2.5}]
    with MetricsWriter(tmp_path) as metrics:
        metrics.write(2, {"train/loss": 2.0})
    lines = (tmp_path / METRICS_NAME).read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_a_resumed_run_replaces_the_steps_that_it_does_again(tmp_path: Path) -> None:
    """The first attempt got to step 4, its newest checkpoint is of step 2."""
    with MetricsWriter(tmp_path) as metrics:
        for step in range(1, 5):
            metrics.write(step, {"train/loss": float(step)})
    with MetricsWriter(tmp_path) as metrics:
        metrics.rewind(2)
        for step in range(3, 6):
            metrics.write(step, {"train/loss": 10.0 * step})
    wanted = [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0), (5, 50.0)]
    assert [(record["step"], record["train/loss"]) for record in read_metrics(tmp_path)] == wanted
    assert scalars(tmp_path, "train/loss") == wanted


def test_a_run_from_the_start_drops_everything_before(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        with MetricsWriter(tmp_path) as metrics:
            metrics.rewind(0)
            metrics.write(1, {"train/loss": value})
    assert read_metrics(tmp_path) == [{"step": 1, "train/loss": 2.0}]


def test_records_before_an_interruption_are_on_disk(tmp_path: Path) -> None:
    def interrupted_run() -> None:
        with MetricsWriter(tmp_path) as metrics:
            metrics.write(1, {"train/loss": 2.5})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted_run()
    assert read_metrics(tmp_path) == [{"step": 1, "train/loss": 2.5}]
    assert scalars(tmp_path, "train/loss") == [(1, 2.5)]


def test_peak_memory_only_grows() -> None:
    before = peak_memory_bytes()
    held = bytearray(1 << 26)
    held[::4096] = b"\1" * len(held[::4096])
    assert 1 << 20 < before <= peak_memory_bytes()


def test_what_is_told_late_does_not_hide_the_newest_step(tmp_path: Path) -> None:
    """A checkpoint is whole some steps after its own."""
    with MetricsWriter(tmp_path) as metrics:
        metrics.write(3, {"train/loss": 3.0})
        metrics.write(2, {"train/checkpoint_seconds": 0.5})
        metrics.write(2, {"train/checkpoint_blocked_seconds": 0.25})
    with MetricsWriter(tmp_path) as metrics:
        metrics.write(4, {"train/loss": 4.0})
    assert scalars(tmp_path, "train/loss") == [(3, 3.0), (4, 4.0)]
    with MetricsWriter(tmp_path) as metrics:
        metrics.rewind(2)
    assert [record["step"] for record in read_metrics(tmp_path)] == [2, 2]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
@pytest.mark.timeout(200)
def test_every_figure_is_in_the_file_in_tensorboard_and_on_the_metrics_page_of_ray(tmp_path: Path) -> None:
    data, output = write_tiny_patches(tmp_path / "patches"), tmp_path / "run"
    job = tiny_job(data, output, steps=4, log_every=2, checkpoint_every=2, valid_every=4)
    train(job)
    records = read_metrics(output)
    newest = {name: value for record in records for name, value in record.items() if name != "step"}
    assert newest.keys() == FIGURES.keys()
    for name in FIGURES:
        told = {int(record["step"]): record[name] for record in records if name in record}
        assert dict(scalars(output, name)) == pytest.approx(told, rel=1e-6), name  # TensorBoard's are float32
    wanted = {f"ray_blt_{name.replace('/', '_')}": pytest.approx(value) for name, value in newest.items()}
    found = wait_for_figures(functools.partial(_scraped, job.run), wanted)
    assert found.keys() == wanted.keys()


def _scraped(run: str, page: str) -> dict[str, float]:
    """The gauges of a run on the page, by name."""
    samples = re.findall(r"^(ray_blt_\w+)\{(.*)\} (\S+)$", page, re.MULTILINE)
    return {name: float(value) for name, labels, value in samples if f'run="{run}"' in labels}
