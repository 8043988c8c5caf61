"""Charts as plain geometry: where axes, ticks, lines and bars stand on a canvas. The page's template draws them.

In: numbers and their names. Out: a `Chart` in units of the canvas, its numbers already rounded and its texts plain.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jobs.report_patches import PatchLengths
from pipelines.patch.calibration import Calibration

WIDTH, HEIGHT = 480, 260
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 14, 42
"""Margins around the plot, for ticks and labels."""
_MAX_POINTS = 400
"""Points of a line; more are averaged in groups, which is all that a canvas of this width can show."""
_HISTOGRAM_SHARE = 0.995
_MOST_BARS, _FEWEST_BARS = 32, 8

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Series:
    """A line to draw; `points` are (x, y) in the units of the data, x ascending."""

    name: str
    points: tuple[Point, ...]
    style: str
    """Class that the style sheet knows: "first", "second" or "reference"."""


@dataclass(frozen=True, kw_only=True)
class Tick:
    """A mark on an axis at `position` on the canvas."""

    position: float
    text: str


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of the chart in units of the canvas; `markers` are its (x, y, text) where points are few."""

    name: str
    style: str
    points: str
    markers: tuple[tuple[float, float, str], ...]


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A bar of a histogram, and the text for the pointer."""

    x: float
    y: float
    width: float
    height: float
    title: str


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A line across the plot with its name: horizontal where `y` is given, vertical where `x` is."""

    text: str
    x: float | None = None
    y: float | None = None


@dataclass(frozen=True, kw_only=True)
class Chart:
    """What the template draws."""

    title: str
    x_label: str
    y_label: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Line, ...] = ()
    bars: tuple[Bar, ...] = ()
    rules: tuple[Rule, ...] = ()
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A linear scale from data to canvas."""

    low: float
    high: float
    start: int
    end: int

    def at(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self, count: int = 5) -> tuple[Tick, ...]:
        """At most about `count` marks at round values."""
        step = _round_step((self.high - self.low) / count)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return tuple(Tick(position=self.at(i * step), text=_tick_text(i * step)) for i in range(first, last + 1))


def line_chart(
    title: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    references: Mapping[str, float] | None = None,
    marked: Point | None = None,
) -> Chart | None:
    """Lines over a common x; `references` are horizontal lines, shown if near; None if there is nothing to draw.

    `marked` is a point that gets lines to both axes.
    """
    shown = [Series(name=s.name, style=s.style, points=_thinned(s.points)) for s in series if s.points]
    if not shown:
        return None
    points = [point for s in shown for point in s.points]
    ys = [y for _, y in points]
    near = {name: y for name, y in (references or {}).items() if min(ys) * 0.7 <= y <= max(ys) * 1.2}
    x_axis = _axis([x for x, _ in points], LEFT, WIDTH - RIGHT)
    y_axis = _axis([*ys, *near.values()], HEIGHT - BOTTOM, TOP)
    rules = [Rule(text=name, y=y_axis.at(y)) for name, y in near.items()]
    if marked is not None:
        rules += [Rule(text="", x=x_axis.at(marked[0])), Rule(text="", y=y_axis.at(marked[1]))]
    return Chart(
        title=title,
        x_label=x_label,
        y_label=y_label,
        x_ticks=x_axis.ticks(),
        y_ticks=y_axis.ticks(),
        lines=tuple(_line(s, x_axis, y_axis) for s in shown),
        rules=tuple(rules),
    )


def training_charts(name: str, records: Sequence[Mapping[str, float]], references: Mapping[str, float]) -> list[Chart]:
    """Bits per byte and loss over steps, training and validation, of one training."""
    charts = []
    for key, name_of_key, y_label in (
        ("bpb", "bits per byte", "bits per byte"),
        ("loss", "loss", "loss (nats per target)"),
    ):
        train = _metric(records, f"train/{key}", "train", "first")
        valid = _metric(records, f"valid/{key}", "valid", "second")
        shown = references if key == "bpb" else {}
        charts.append(line_chart(f"{name}: {name_of_key}", [train, valid], "step", y_label, shown))
    return [chart for chart in charts if chart is not None]


def calibration_chart(calibration: Calibration) -> Chart | None:
    """Mean patch size over the threshold, with the chosen threshold marked."""
    points = tuple((row.threshold, row.mean_patch_bytes) for row in calibration.table)
    series = Series(name="mean patch", points=points, style="first")
    chosen = (calibration.threshold, calibration.mean_patch_bytes)
    return line_chart("Threshold and mean patch size", [series], "threshold (nats)", "bytes per patch", marked=chosen)


def histogram(lengths: PatchLengths) -> Chart | None:
    """Share of the patches of each length; the rare long ones share the last bar."""
    total = lengths.patches
    if not total:
        return None
    last = min(max(lengths.quantile(_HISTOGRAM_SHARE), _FEWEST_BARS), _MOST_BARS, lengths.longest)
    counts = [(str(n), lengths.counts[n]) for n in range(1, last + 1)]
    if beyond := sum(lengths.counts[last + 1 :]):
        counts.append((f">{last}", beyond))
    shares = [100 * count / total for _, count in counts]
    y_axis = _axis([0.0, *shares], HEIGHT - BOTTOM, TOP)
    step = (WIDTH - RIGHT - LEFT) / len(counts)
    every = math.ceil(len(counts) / 16)
    ticks = [
        Tick(position=round(LEFT + (i + 0.5) * step, 1), text=text)
        for i, (text, _) in enumerate(counts)
        if (i % every == 0 and i < last) or i == last
    ]
    return Chart(
        title="Patch lengths",
        x_label="bytes in the patch",
        y_label="% of patches",
        x_ticks=tuple(ticks),
        y_ticks=y_axis.ticks(),
        bars=tuple(_bar(i, step, *counts[i], shares[i], y_axis) for i in range(len(counts))),
    )


def _bar(index: int, step: float, text: str, count: int, share: float, y_axis: Axis) -> Bar:
    top = y_axis.at(share)
    return Bar(
        x=round(LEFT + (index + 0.08) * step, 1),
        y=top,
        width=round(step * 0.84, 1),
        height=round(HEIGHT - BOTTOM - top, 1),
        title=f"{text} byte{'' if text == '1' else 's'}: {count:,} patches, {share:.2f} %",
    )


def _metric(records: Sequence[Mapping[str, float]], key: str, name: str, style: str) -> Series:
    points = tuple((record["step"], record[key]) for record in records if key in record and math.isfinite(record[key]))
    return Series(name=name, points=points, style=style)


def _line(series: Series, x_axis: Axis, y_axis: Axis) -> Line:
    at = [(x_axis.at(x), y_axis.at(y)) for x, y in series.points]
    titles = [f"{series.name}: {y:.4g} at {x:.6g}" for x, y in series.points]
    marked = len(at) <= 40
    return Line(
        name=series.name,
        style=series.style,
        points=" ".join(f"{x:g},{y:g}" for x, y in at),
        markers=tuple((x, y, title) for (x, y), title in zip(at, titles, strict=True)) if marked else (),
    )


def _axis(values: Sequence[float], start: int, end: int) -> Axis:
    """A scale that holds the values, from a tick to a tick."""
    low, high = min(values), max(values)
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    step = _round_step((high - low) / 5)
    return Axis(low=math.floor(low / step) * step, high=math.ceil(high / step) * step, start=start, end=end)


def _round_step(step: float) -> float:
    """The next of 1, 2, 2.5, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= step * (1 - 1e-9))


def _tick_text(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{round(value, 6):g}"


def _thinned(points: tuple[Point, ...]) -> tuple[Point, ...]:
    """Means of equal groups of points where there are too many."""
    size = math.ceil(len(points) / _MAX_POINTS)
    groups = (points[i : i + size] for i in range(0, len(points), size)) if size > 1 else ((p,) for p in points)
    return tuple((sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups)
