"""What the page shows of a training: its curves with interruptions marked, its account, its speed, each interruption.

In: the metrics records and the `History` of a training. Out: charts for the template, and rows of text.
"""

import functools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from rich.filesize import decimal

from jobs.report_axis import Axis, round_axis
from jobs.report_chart import Chart, Mark, Point, Series, line_chart
from jobs.report_run import History, Run, Update
from jobs.report_table import Row, duration
from pipelines.train.account import Account, Interruption

_START = 0.03
"""Share of a training whose steep fall does not set the scale."""

Records = Sequence[Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class InterruptionRow:
    """One interruption as text, or all of them together."""

    cause: str
    step: str
    steps_redone: str
    tries_lost: str
    seconds_lost: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class TrainingView:
    """A training on the page."""

    name: str
    charts: tuple[Chart, ...]
    has_account: bool
    """Whether there is a timeline to know of interruptions from."""
    account: tuple[Row, ...]
    speed: tuple[Row, ...]
    interruptions: tuple[InterruptionRow, ...]
    total: InterruptionRow | None
    """Of several interruptions."""


def training_views(run: Run) -> list[TrainingView]:
    """The trainings of a run of which there is anything to show, the BLT's first."""
    references = run.evaluation.baselines if run.evaluation is not None else {}
    views = [
        training_view(
            name, run.metrics.get(part, ()), run.histories.get(part), references, with_patches=part == "model"
        )
        for part, name in (("model", "BLT"), ("entropy_model", "Entropy model"))
    ]
    return [view for view in views if view.charts]


def training_view(
    name: str, records: Records, history: History | None, references: Mapping[str, float], *, with_patches: bool
) -> TrainingView:
    """One training; `references` are bits per byte to show beside its own."""
    found = history.account.interruptions if history is not None else ()
    marks = tuple(Mark(x=one.step, title=_mark_title(one)) for one in found)
    charts = [*_loss_charts(name, records, references, marks)]
    if history is not None:
        charts += _pace_charts(name, history.updates, marks)
    return TrainingView(
        name=name,
        charts=tuple(chart for chart in charts if chart is not None),
        has_account=history is not None,
        account=tuple(account_rows(history)) if history is not None else (),
        speed=tuple(speed_rows(records, with_patches=with_patches)),
        interruptions=tuple(_interruption_row(one) for one in found),
        total=_total_row(history.account) if history is not None and len(found) > 1 else None,
    )


def account_rows(history: History) -> list[Row]:
    """What a training did and what it lost."""
    account = history.account
    tries = "1 try" if account.tries_lost == 1 else f"{account.tries_lost:,} tries"
    again = [f"{account.steps_redone:,} done again"] if account.steps_redone else []
    again += [f"{tries} given up"] if account.tries_lost else []
    still = f"training stood still {duration(account.checkpoint_blocked_seconds)} for them"
    workers = sorted({update.workers for update in history.updates})
    rows = [
        Row(label="Steps", value=f"{account.steps:,}", note=", ".join(again) or "none done again"),
        Row(label="Steps kept", value=_percent(account.steps_kept), note="of all that were tried"),
        Row(label="Time", value=duration(account.seconds), note="from the first step to the last"),
        Row(label="Time lost", value=duration(account.seconds_lost), note="to interruptions"),
        Row(label="Goodput", value=_percent(account.goodput), note="share of the time that is not lost"),
        Row(label="Start", value=duration(account.startup_seconds), note="from the command to the first step"),
        Row(label="Checkpoints", value=f"{account.checkpoints:,}", note=still if account.checkpoints else ""),
    ]
    number = f"{workers[0]} to {workers[-1]}" if len(workers) > 1 else str(workers[0])
    return [*rows, Row(label="Workers", value=number)]


def speed_rows(records: Records, *, with_patches: bool) -> list[Row]:
    """Medians over the records of a training, as far as they have them."""

    def of(name: str) -> list[float]:
        return [record[name] for record in records if name in record]

    rows: list[Row] = []
    if values := of("train/bytes_per_second"):
        rows.append(Row(label="Bytes/s", value=f"{decimal(round(statistics.median(values)))}/s", note="all workers"))
    if with_patches and (values := of("train/patches_per_second")):
        rows.append(Row(label="Patches/s", value=f"{statistics.median(values):,.0f}", note="all workers"))
    if values := of("train/step_seconds"):
        rows.append(Row(label="Step", value=f"{statistics.median(values):.3g} s", note="one update"))
    if values := of("train/mfu"):
        rows.append(Row(label="MFU", value=_percent(statistics.median(values)), note="of the devices' peak FLOP/s"))
    if values := of("train/data_wait_fraction"):
        value = f"{100 * statistics.median(values):.2f} %"
        rows.append(Row(label="Data wait", value=value, note="of the steps' time"))
    if values := of("train/peak_memory_bytes"):
        rows.append(Row(label="Memory", value=decimal(round(max(values))), note="of a worker, at most"))
    return rows


def _loss_charts(
    name: str, records: Records, references: Mapping[str, float], marks: Sequence[Mark]
) -> list[Chart | None]:
    """Bits per byte and loss over steps, training and validation."""
    charts = []
    for key, name_of_key, y_label in (
        ("bpb", "bits per byte", "bits per byte"),
        ("loss", "loss", "loss (nats per target)"),
    ):
        train = _metric(records, f"train/{key}", "train", "first")
        valid = _metric(records, f"valid/{key}", "valid", "second")
        charts.append(
            line_chart(
                f"{name}: {name_of_key}",
                [train, valid],
                "step",
                y_label,
                most=_after_the_start([*train.points, *valid.points]),
                references=references if key == "bpb" else {},
                marks=marks,
                mark_name="interruption",
            )
        )
    return charts


def _pace_charts(name: str, updates: Sequence[Update], marks: Sequence[Mark]) -> list[Chart | None]:
    """Seconds of a step, and number of workers, over steps."""
    seconds = tuple((float(update.step), update.seconds) for update in updates)
    draw = functools.partial(line_chart, x_label="step", marks=marks, mark_name="interruption")
    return [
        draw(
            f"{name}: seconds per step",
            [Series(name="seconds", points=seconds, style="first")],
            y_label="seconds",
            most=_after_the_start(seconds),
            y_axis=_from_zero,
        ),
        draw(
            f"{name}: workers",
            [Series(name="workers", points=_stairs(updates), style="fourth")],
            y_label="workers",
            y_axis=functools.partial(_from_zero, least_step=1.0),
        ),
    ]


def _from_zero(values: Sequence[float], start: int, end: int, least_step: float = 0.0) -> Axis:
    return round_axis([0.0, *values], start, end, least_step)


def _stairs(updates: Sequence[Update]) -> tuple[Point, ...]:
    """Workers over steps: a point before and after each change, and at both ends."""
    points = [(updates[0].step, updates[0].workers)]
    for before, after in pairwise(updates):
        if before.workers != after.workers:
            points += [(after.step, before.workers), (after.step, after.workers)]
    points.append((updates[-1].step, updates[-1].workers))
    return tuple((float(step), float(workers)) for step, workers in points)


def _metric(records: Records, key: str, name: str, style: str) -> Series:
    points = tuple((record["step"], record[key]) for record in records if key in record and math.isfinite(record[key]))
    return Series(name=name, points=points, style=style)


def _after_the_start(points: Sequence[Point]) -> float:
    """The highest y once the first steps of a training are over."""
    last = max((x for x, _ in points), default=0.0)
    return max((y for x, y in points if x >= _START * last), default=math.inf)


def _mark_title(one: Interruption) -> str:
    lost = f"{one.cause} after step {one.step:,}: {duration(one.seconds_lost)} lost"
    return f"{lost}, steps done again: {one.steps_redone:,}" if one.steps_redone else lost


def _interruption_row(one: Interruption) -> InterruptionRow:
    return InterruptionRow(
        cause=one.cause,
        step=f"{one.step:,}",
        steps_redone=f"{one.steps_redone:,}",
        tries_lost=f"{one.tries_lost:,}",
        seconds_lost=f"{one.seconds_lost:,.1f}",
        detail=one.detail,
    )


def _total_row(account: Account) -> InterruptionRow:
    return InterruptionRow(
        cause="all",
        step="",
        steps_redone=f"{account.steps_redone:,}",
        tries_lost=f"{account.tries_lost:,}",
        seconds_lost=f"{account.seconds_lost:,.1f}",
        detail="",
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
