"""Progress where there is no terminal: log lines on a timer, and one at the end."""

import logging

import pytest

from jobs import progress as module
from jobs.progress import progress


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
