"""Progress where there is no terminal: log lines on a timer, and one at the end."""

import logging
import re

import pytest

from jobs import progress as module
from jobs.progress import progress
from jobs.stage_metrics import DONE, PLANNED, exported_stages
from pipelines.log_line import add_fields, lines_of_a_run
from tests.metrics_page import wait_for_figures


def test_log_lines_are_paced_and_end_with_the_totals(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    with progress("patching", total=3000, unit="bytes") as bar:
        bar.advance(1000)
        assert caplog.messages == []
        monkeypatch.setattr(module, "LOG_EVERY_SECONDS", 0.0)
        bar.update(mean_patch_bytes=4.5)
        monkeypatch.setattr(module, "LOG_EVERY_SECONDS", 10.0)
        bar.advance(2000)
    running, done = caplog.messages
    assert running.startswith("patching running 1.0 kB/3.0 kB ")
    assert running.endswith(" mean_patch_bytes=4.5")
    assert done.startswith("patching done 3.0 kB/3.0 kB ")


def test_failed_work_is_not_reported_as_done(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    def train() -> None:
        with progress("training", unit="steps") as bar:
            bar.advance()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        train()
    assert caplog.messages[-1].startswith("training stopped 1 steps ")


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
@pytest.mark.timeout(200)
def test_what_is_done_is_on_the_metrics_page_of_ray() -> None:
    with lines_of_a_run(as_json=False, details=False), exported_stages():
        add_fields(run="shard-0")
        with progress("scraped", total=3000, unit="bytes") as bar:
            bar.advance(1000)
            bar.advance(1500)
    wanted = {f"ray_{DONE}_total": 2500.0, f"ray_{PLANNED}": 3000.0}
    assert wait_for_figures(_scraped, wanted).keys() == wanted.keys()


def _scraped(page: str) -> dict[str, float]:
    """The metrics of the stage on the page, by name."""
    samples = re.findall(r"^(ray_blt_\w+)\{(.*)\} (\S+)$", page, re.MULTILINE)
    labels = {'stage="scraped"', 'unit="bytes"', 'run="shard-0"'}
    return {name: float(value) for name, told, value in samples if labels <= set(told.split(","))}
