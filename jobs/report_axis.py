"""Axes of charts: linear scales from data to a canvas, with marks at round values."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Tick:
    """A mark on an axis at `position` on the canvas."""

    position: float
    text: str


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A linear scale from data to canvas."""

    low: float
    high: float
    start: int
    end: int
    least_step: float = 0.0
    """Marks are at least so far apart, in units of the data: 1 for counts."""

    def at(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self, count: int = 5) -> tuple[Tick, ...]:
        """At most about `count` marks at round values."""
        step = max(_round_step((self.high - self.low) / count), self.least_step)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return tuple(Tick(position=self.at(i * step), text=_tick_text(i * step)) for i in range(first, last + 1))


def round_axis(values: Sequence[float], start: int, end: int, least_step: float = 0.0) -> Axis:
    """A scale that holds the values, from a tick to a tick."""
    low, high = min(values), max(values)
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    step = max(_round_step((high - low) / 5), least_step)
    low, high = math.floor(low / step) * step, math.ceil(high / step) * step
    return Axis(low=low, high=high, start=start, end=end, least_step=least_step)


def exact_axis(values: Sequence[float], start: int, end: int) -> Axis:
    """A scale that ends with the values, and begins at 0 if they begin near it."""
    low, high = min(values), max(values)
    if high - low < 1e-9:
        return round_axis(values, start, end)
    return Axis(low=0.0 if 0 <= low < 0.2 * high else low, high=high, start=start, end=end)


def _round_step(step: float) -> float:
    """The next of 1, 2, 2.5, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= step * (1 - 1e-9))


def _tick_text(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{round(value, 6):g}"
