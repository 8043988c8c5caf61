"""docs/metrics.md: its tables name the figures and metrics that there are."""

import json
import logging
import re
from pathlib import Path

from jobs.stage_metrics import DONE, PLANNED
from pipelines.log_line import JsonLines, add_fields, lines_of_a_run
from pipelines.patch.metrics import _COUNTERS
from pipelines.train.metrics import FIGURES

DOCUMENT = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text(encoding="utf-8")


def named(heading: str) -> list[str]:
    """Names in the first column of the table below a heading."""
    section = DOCUMENT.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)


def test_figures_of_training() -> None:
    assert named("Training") == list(FIGURES)


def test_metrics_of_every_stage() -> None:
    assert named("Every stage") == [f"ray_{DONE}_total", f"ray_{PLANNED}"]


def test_metrics_of_patching() -> None:
    counters = [f"ray_blt_patch_{name}_total" for name in _COUNTERS]
    assert named("Patching") == [*counters, "ray_blt_patch_actor_bytes_per_second"]


def test_fields_of_log_lines() -> None:
    """Those of a record in a worker of a run; tests/jobs/test_log_lines.py has them in a real one."""
    with lines_of_a_run(as_json=True, details=False):
        add_fields(run="train-0", command="train", process="train worker", metrics_run="0", rank=0)
        record = logging.makeLogRecord({"exc_info": (ValueError, ValueError("no"), None)})
        assert set(json.loads(JsonLines().format(record))) == set(named("Log lines"))


def test_links_lead_to_files() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", DOCUMENT):
        assert (Path(__file__).parent.parent / "docs" / target).exists(), target
