"""Charts as plain geometry: where axes, ticks, lines and bars stand on a canvas. The page's template draws them.

In: numbers and their names. Out: a `Chart` in units of the canvas, its numbers already rounded and its texts plain.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from jobs.report_axis import Axis, Tick, exact_axis, round_axis
from jobs.report_patches import PatchLengths

WIDTH, HEIGHT = 480, 260
LEFT, RIGHT, TOP, BOTTOM = 52, 20, 14, 42
"""Margins around the plot, for ticks and labels."""
_MAX_POINTS = 400
"""Points of a line; more are averaged in groups, which is all that a canvas of this width can show."""
_MARK_WIDTH = 4
"""Marks nearer than this are drawn as one."""
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
class Mark:
    """Something that happened at `x`, and the text for the pointer."""

    x: float
    title: str


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
    marks: tuple[Mark, ...] = ()
    mark_name: str = ""
    """What the marks are, for the legend."""
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
    marks: Sequence[Mark] = (),
    mark_name: str = "",
    y_axis: Callable[[Sequence[float], int, int], Axis] = round_axis,
) -> Chart | None:
    """Lines over a common x, cut above `most`; None if there is nothing to draw.

    `references` are named horizontal lines, shown where the lines come near; `marked` is a point on dashed lines;
    `marks`, in units of the data, are of things that are called `mark_name`.
    """
    shown = [dataclasses.replace(s, points=_thinned(s.points)) for s in series if s.points]
    if not shown:
        return None
    points = [point for s in shown for point in s.points]
    ys = [y for _, y in points if y <= most]
    near = {name: y for name, y in (references or {}).items() if min(ys) * 0.8 <= y <= max(ys)}
    xs = exact_axis([*(x for x, _ in points), *(mark.x for mark in marks)], LEFT, WIDTH - RIGHT)
    scale = y_axis([*ys, *near.values()], HEIGHT - BOTTOM, TOP)
    rules = _named_rules(near, scale)
    if marked is not None:
        rules += [Rule(x=xs.at(marked[0])), Rule(y=scale.at(marked[1]))]
    return Chart(
        title=title,
        x_label=x_label,
        y_label=y_label,
        x_ticks=xs.ticks(),
        y_ticks=scale.ticks(),
        lines=tuple(_line(s, xs, scale) for s in shown),
        rules=tuple(rules),
        marks=_merged(marks, xs),
        mark_name=mark_name if marks else "",
        is_cut=any(y > scale.high for _, y in points),
    )


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


def _named_rules(values: Mapping[str, float], y_axis: Axis) -> list[Rule]:
    """Horizontal lines from the top down, each name above its line, or below it where it would meet the one before."""
    rules: list[Rule] = []
    for name, value in sorted(values.items(), key=lambda item: -item[1]):
        y = y_axis.at(value)
        crowded = bool(rules) and y - 4 - rules[-1].text_y < 17
        rules.append(Rule(text=name, text_y=y + 12 if crowded else y - 4, y=y))
    return rules


def _merged(marks: Sequence[Mark], x_axis: Axis) -> tuple[Mark, ...]:
    """On the canvas, those that would cover each other as one."""
    merged: list[Mark] = []
    for mark in sorted(marks, key=lambda mark: mark.x):
        x = x_axis.at(mark.x)
        if merged and x - merged[-1].x < _MARK_WIDTH:
            merged[-1] = Mark(x=merged[-1].x, title=f"{merged[-1].title}\n{mark.title}")
        else:
            merged.append(Mark(x=x, title=mark.title))
    return tuple(merged)


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
