"""What the page shows of a calibration: its charts, and its figures for each source as rows of text.

In: a `Calibration`. Out: charts for the template, and rows of one threshold or of all.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

from jobs.report_chart import STYLES, Chart, Series, line_chart
from pipelines.patch.calibration import Calibration, CalibrationRow, SourceCalibration

_MOST_OVER_CHOSEN = 4
"""Mean patch sizes above this many times the chosen one do not set the scale."""
WHOLE = "whole sample"


@dataclass(frozen=True, kw_only=True)
class SourceRow:
    """What one threshold gives on one source, or on the whole sample, as text."""

    source: str
    documents: str
    bytes: str
    threshold: str
    mean_patch_bytes: str
    p99_patch_bytes: str
    one_byte_percent: str
    is_chosen: bool


def calibration_charts(calibration: Calibration) -> list[Chart]:
    """Mean patch size, and share of one-byte patches, over the threshold: a line for the whole and one for each of the
    sources with the most sampled bytes, the chosen threshold marked."""
    most = _MOST_OVER_CHOSEN * calibration.mean_patch_bytes
    mean = _chart(calibration, "mean patch size", "bytes per patch", lambda row: row.mean_patch_bytes, most)
    share = _chart(calibration, "one-byte patches", "% of patches", lambda row: 100 * row.one_byte_share, math.inf)
    return [chart for chart in (mean, share) if chart is not None]


def drawn_sources(calibration: Calibration) -> list[SourceCalibration]:
    """The sources that have a line of their own, most bytes first; none where there is but one."""
    if len(calibration.sources) < 2:
        return []
    return sorted(calibration.sources, key=lambda s: (-s.sample_bytes, s.source))[: len(STYLES) - 1]


def chosen_rows(calibration: Calibration) -> list[SourceRow]:
    """The chosen threshold on each source, most bytes first, and on the whole sample."""
    return [row for row in all_rows(calibration) if row.is_chosen]


def all_rows(calibration: Calibration) -> list[SourceRow]:
    """Every threshold of the table on each source, most bytes first, and on the whole sample."""
    whole = SourceCalibration(
        source=WHOLE,
        sample_documents=calibration.sample_documents,
        sample_bytes=calibration.sample_bytes,
        table=calibration.table,
    )
    sources = sorted(calibration.sources, key=lambda s: (-s.sample_bytes, s.source))
    return [_row(part, row, calibration.threshold) for part in [*sources, whole] for row in part.table]


def _chart(
    calibration: Calibration, title: str, y_label: str, figure: Callable[[CalibrationRow], float], most: float
) -> Chart | None:
    parts = [(WHOLE, calibration.table), *((s.source, s.table) for s in drawn_sources(calibration))]
    series = [
        Series(name=name, points=tuple((row.threshold, figure(row)) for row in table), style=style)
        for (name, table), style in zip(parts, STYLES, strict=False)
    ]
    chosen = next(row for row in calibration.table if row.threshold == calibration.threshold)
    x_label = "rise (nats)" if calibration.rule.monotonic else "threshold (nats)"
    marked = (calibration.threshold, figure(chosen))
    chart = line_chart(f"Threshold and {title}", series, x_label, y_label, most=most, marked=marked)
    # The line of the whole sample is drawn last, over those of the sources.
    return chart and dataclasses.replace(chart, lines=(*chart.lines[1:], chart.lines[0]))


def _row(part: SourceCalibration, row: CalibrationRow, chosen: float) -> SourceRow:
    return SourceRow(
        source=part.source,
        documents=f"{part.sample_documents:,}",
        bytes=f"{part.sample_bytes:,}",
        threshold=f"{row.threshold:.5f}",
        mean_patch_bytes=f"{row.mean_patch_bytes:.2f}",
        p99_patch_bytes=str(row.p99_patch_bytes),
        one_byte_percent=f"{100 * row.one_byte_share:.1f} %",
        is_chosen=row.threshold == chosen,
    )
