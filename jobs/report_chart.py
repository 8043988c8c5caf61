"""Charts as plain geometry: where axes, ticks, lines and bars stand on a canvas. The page's template draws them.

In: numbers and their names. Out: a `Chart` in units of the canvas, its numbers already rounded and its texts plain.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jobs.report_axis import Axis, Tick, exact_axis, round_axis
from jobs.report_patches import PatchLengths

WIDTH, HEIGHT = 480, 260
LEFT, RIGHT, TOP, BOTTOM = 52, 20, 14, 42
"""Margins around the plot, for ticks and labels."""
_MAX_POINTS = 400
"""Points of a line; more are averaged in groups, which is all that a canvas of this width can show."""
_START = 0.03
"""Share of a training whose steep fall does not set the scale."""
_HISTOGRAM_SHARE = 0.995
_MOST_BARS, _FEWEST_BARS = 32, 8

STYLES = ("first", "second", "third", "fourth", "fifth", "sixth")
"""Classes of lines that the style sheet knows, each with a colour of its own."""

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Series:
    """A line to draw; `points` are (x, y) in the units of the data, x ascending."""

    name: str
    points: tuple[Point, ...]
    style: str
    """One of STYLES."""


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
    """A line across the plot: horizontal where `y` is given, vertical where `x` is."""

    text: str = ""
    text_y: float = 0.0
    """Base line of the text, which stands at the right end of a horizontal line."""
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
    is_cut: bool = False
    """Whether lines go on above the plot."""
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def line_chart(
    title: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    most: float = math.inf,
    references: Mapping[str, float] | None = None,
    marked: Point | None = None,
) -> Chart | None:
    """Lines over a common x, cut above `most`; None if there is nothing to draw.

    `references` are named horizontal lines, shown where the lines come near; `marked` is a point on dashed lines.
    """
    shown = [dataclasses.replace(s, points=_thinned(s.points)) for s in series if s.points]
    if not shown:
        return None
    points = [point for s in shown for point in s.points]
    ys = [y for _, y in points if y <= most]
    near = {name: y for name, y in (references or {}).items() if min(ys) * 0.8 <= y <= max(ys)}
    x_axis = exact_axis([x for x, _ in points], LEFT, WIDTH - RIGHT)
    y_axis = round_axis([*ys, *near.values()], HEIGHT - BOTTOM, TOP)
    rules = _named_rules(near, y_axis)
    if marked is not None:
        rules += [Rule(x=x_axis.at(marked[0])), Rule(y=y_axis.at(marked[1]))]
    return Chart(
        title=title,
        x_label=x_label,
        y_label=y_label,
        x_ticks=x_axis.ticks(),
        y_ticks=y_axis.ticks(),
        lines=tuple(_line(s, x_axis, y_axis) for s in shown),
        rules=tuple(rules),
        is_cut=any(y > y_axis.high for _, y in points),
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
        most = _after_the_start([*train.points, *valid.points])
        title = f"{name}: {name_of_key}"
        charts.append(line_chart(title, [train, valid], "step", y_label, most=most, references=shown))
    return [chart for chart in charts if chart is not None]


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
    y_axis = round_axis([0.0, *shares], HEIGHT - BOTTOM, TOP)
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


def _after_the_start(points: Sequence[Point]) -> float:
    """The highest y once the first steps of a training are over."""
    last = max((x for x, _ in points), default=0.0)
    return max((y for x, y in points if x >= _START * last), default=math.inf)


def _named_rules(values: Mapping[str, float], y_axis: Axis) -> list[Rule]:
    """Horizontal lines from the top down, each name above its line, or below it where it would meet the one before."""
    rules: list[Rule] = []
    for name, value in sorted(values.items(), key=lambda item: -item[1]):
        y = y_axis.at(value)
        crowded = bool(rules) and y - 4 - rules[-1].text_y < 17
        rules.append(Rule(text=name, text_y=y + 12 if crowded else y - 4, y=y))
    return rules


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


def _thinned(points: tuple[Point, ...]) -> tuple[Point, ...]:
    """Means of equal groups of points where there are too many."""
    size = math.ceil(len(points) / _MAX_POINTS)
    groups = (points[i : i + size] for i in range(0, len(points), size)) if size > 1 else ((p,) for p in points)
    return tuple((sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups)
