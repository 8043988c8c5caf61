"""Progress where there is no terminal: log lines on a timer, and one at the end."""

import logging
import re
import time
import urllib.request

import pytest
import ray

from jobs import progress as module
from jobs.progress import progress
from jobs.stage_metrics import DONE, PLANNED, exported_stages
from pipelines.log_line import add_fields, lines_of_a_run


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
def test_what_is_done_is_on_the_metrics_page_of_ray() -> None:
    with lines_of_a_run(as_json=False, details=False), exported_stages():
        add_fields(run="shard-0")
        with progress("scraped", total=3000, unit="bytes") as bar:
            bar.advance(1000)
            bar.advance(1500)
    wanted = {f"ray_{DONE}_total": 2500.0, f"ray_{PLANNED}": 3000.0}
    deadline = time.monotonic() + 30
    while (found := _scraped("scraped")) != wanted:
        assert time.monotonic() < deadline, f"{found}, wanted {wanted}"
        time.sleep(0.2)


def _scraped(stage: str) -> dict[str, float]:
    """The metrics of a stage on the page, by name."""
    port = ray.nodes()[0]["MetricsExportPort"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
        samples = re.findall(r"^(ray_blt_\w+)\{(.*)\} (\S+)$", page.read().decode(), re.MULTILINE)
    labels = {f'stage="{stage}"', 'unit="bytes"', 'run="shard-0"'}
    return {name: float(value) for name, told, value in samples if labels <= set(told.split(","))}
