"""The report's page: one HTML file that needs nothing else, no script and no network, in light and dark and on paper.

In: a `Run` and what was read from its patch dataset. Out: the text of the page.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import yaml

from jobs.evaluate_table import sample_line, tables
from jobs.page import render_page
from jobs.passage_layout import COLUMN_WIDTH, CURVE_HEIGHT, Layout, lay_out
from jobs.report_calibration import all_rows, calibration_charts, chosen_rows, drawn_sources
from jobs.report_chart import histogram
from jobs.report_patches import Passage, PatchLengths
from jobs.report_run import COMMANDS, Run
from jobs.report_table import Comparison, comparisons, headline, stage_rows, summary_rows
from jobs.report_training import training_views

_TEMPLATE = "report.html.jinja"


@dataclass(frozen=True, kw_only=True)
class PatchView:
    """What the page shows of a patch dataset."""

    lengths: PatchLengths
    passage: Passage | None
    entropies: tuple[float, ...] | None
    """Nats, one per byte of the passage; None if there is no entropy model to compute them."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a part of the run came from."""

    part: str
    command: str
    directory: str
    fingerprints: tuple[tuple[str, str], ...]
    config: str
    """YAML; empty without a record."""


def render(run: Run, title: str, view: PatchView | None, left_out: Sequence[str], fingerprint: str) -> str:
    """The page of a run; `left_out` says in words what could not be shown, `fingerprint` is written at the top."""
    rule = run.patches.patching.rule if run.patches is not None and run.patches.patching is not None else None
    threshold = rule.threshold if rule is not None and rule.kind == "entropy" and not rule.monotonic else None
    layout: Layout | None = None
    if view is not None and view.passage is not None:
        passage = view.passage
        layout = lay_out(passage.text, passage.starts, view.entropies, threshold, offset=passage.offset)
    return render_page(
        _TEMPLATE,
        title=title,
        fingerprint=fingerprint,
        run=run,
        headline=headline(run),
        rows=summary_rows(run),
        stages=stage_rows(run),
        comparisons=_bars(run),
        evaluation_tables=tables(run.evaluation) if run.evaluation is not None else [],
        sample_line=sample_line(run.evaluation) if run.evaluation is not None else None,
        view=view,
        layout=layout,
        threshold=threshold,
        histogram=histogram(view.lengths) if view is not None else None,
        trainings=training_views(run),
        calibration=run.calibration,
        calibration_charts=calibration_charts(run.calibration) if run.calibration is not None else [],
        drawn_sources=drawn_sources(run.calibration) if run.calibration is not None else [],
        chosen_rows=chosen_rows(run.calibration) if run.calibration is not None else [],
        threshold_rows=all_rows(run.calibration) if run.calibration is not None else [],
        sources=_sources(run),
        left_out=left_out,
        column_width=COLUMN_WIDTH,
        curve_height=CURVE_HEIGHT,
    )


def _bars(run: Run) -> list[tuple[Comparison, float]]:
    """What was compared, and the length of each bar in percent."""
    found = comparisons(run)
    longest = max((row.bpb for row in found), default=0.0) or math.inf
    return [(row, round(100 * row.bpb / longest, 1)) for row in found]


def _sources(run: Run) -> list[Source]:
    return [_source(run, part) for part in COMMANDS if part in run.directories]


def _source(run: Run, part: str) -> Source:
    record = run.records.get(part)
    fingerprints = []
    dataset = {"documents": run.documents, "patches": run.patches}.get(part)
    if dataset is not None:
        fingerprints.append(("dataset", dataset.fingerprint))
        if dataset.patching is not None and dataset.patching.entropy_model is not None:
            fingerprints.append(("entropy model", dataset.patching.entropy_model))
    if part == "calibration" and run.calibration is not None:
        fingerprints.append(("entropy model", run.calibration.entropy_model))
        fingerprints.append(("documents", run.calibration.documents))
    if record is not None:
        fingerprints.append(("configuration and inputs", record.fingerprint))
    return Source(
        part=part,
        command=COMMANDS[part],
        directory=run.directories[part],
        fingerprints=tuple(fingerprints),
        config=yaml.safe_dump(dict(record.config), sort_keys=False, allow_unicode=True) if record is not None else "",
    )
