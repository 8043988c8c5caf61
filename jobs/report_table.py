"""The figures of a run as rows of text, for the page and for the terminal alike.

In: a `Run`. Out: rows with a label, a value and a note; `print_summary` shows them with rich.
"""

import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from jobs.report_run import Run, StageFigures, read_run, run_directories, stages
from pipelines.manifest import Manifest


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure: what it is, its value with its unit, and what it was measured on."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class StageRow:
    """What one command took, as text; empty where a figure does not apply."""

    command: str
    seconds: str
    bytes: str
    bytes_per_second: str
    """Bytes over all of its seconds."""
    working_bytes_per_second: str
    """Without starting, as it measured itself."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Bits per byte of one model or compressor on the held-out text."""

    name: str
    bpb: float
    low: float | None = None
    high: float | None = None
    is_result: bool = False
    """Whether it is the BLT's."""


def summary_rows(run: Run) -> list[Row]:
    """The table of a run; what it does not hold is left out."""
    return [*_dataset_rows(run), *_patch_rows(run), *_bpb_rows(run)]


def stage_rows(run: Run) -> list[StageRow]:
    """Seconds and speed of every finished stage, and their sum where there are several."""
    found = stages(run)
    rows = [_stage_row(stage) for stage in found]
    if len(rows) > 1:
        total = f"{sum(stage.seconds for stage in found):,.1f}"
        rows.append(StageRow(command="all", seconds=total, bytes="", bytes_per_second="", working_bytes_per_second=""))
    return rows


def comparisons(run: Run) -> list[Comparison]:
    """Everything measured on the same held-out text, worst first."""
    found = run.evaluation
    if found is None:
        return []
    rows = [Comparison(name=name, bpb=bpb) for name, bpb in found.baselines.items()]
    if found.entropy_model_bpb is not None:
        rows.append(Comparison(name="entropy model", bpb=found.entropy_model_bpb))
    if found.bpb is not None:
        rows.append(Comparison(name="BLT", bpb=found.bpb, low=found.bpb_low, high=found.bpb_high, is_result=True))
    return sorted(rows, key=lambda row: -row.bpb)


def headline(run: Run) -> list[Row]:
    """The few figures that stand at the top of the page."""
    rows: list[Row] = []
    evaluation = run.evaluation
    if evaluation is not None:
        gzip = evaluation.baselines.get("gzip -9")
        note = "bits per byte, held-out text"
        if gzip:
            change = 100 * (evaluation.bpb / gzip - 1)
            note = f"bits per byte, held-out; {abs(change):.1f} % {'below' if change < 0 else 'above'} gzip -9"
        rows.append(Row(label="BLT", value=f"{evaluation.bpb:.3f}", note=note))
    patches = _patches(run.patches)
    if run.patches is not None and patches:
        rows.append(Row(label="Mean patch", value=f"{run.patches.bytes / patches:.2f}", note="bytes per patch"))
    dataset = run.documents or run.patches
    if dataset is not None:
        rows.append(Row(label="Text", value=decimal(dataset.bytes), note=f"{dataset.documents:,} documents"))
    if len(found := stages(run)) > 1:
        seconds = sum(stage.seconds for stage in found)
        rows.append(Row(label="Time", value=duration(seconds), note=f"{len(found)} stages, starts included"))
    return rows


def duration(seconds: float) -> str:
    """Seconds, or minutes and seconds, or hours and minutes."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def print_summary(run: str, console: Console | None = None) -> None:
    """Print tables, sample and the page's path of the run in `run`, to standard output unless told otherwise."""
    console = console or Console()
    found = read_run(run_directories(run))
    console.print(rows_table(summary_rows(found)))
    if rows := stage_rows(found):
        console.print(_stage_table(rows))
    if found.sample is not None:
        console.print(Text("Generated after the prompt:", style="bold"))
        console.print(Text.assemble((visible(found.sample.prompt), "dim"), visible(found.sample.text)), end="\n\n")
    if (page := Path(run) / "report.html").exists():
        console.print(Text.assemble(("Report: ", "bold"), str(page)), soft_wrap=True)


def rows_table(rows: Iterable[Row]) -> Table:
    """The rows for a terminal; that of the BLT's result stands out."""
    table = Table(box=box.SIMPLE_HEAD, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim")
    for row in rows:
        style = "bold green" if row.label == "BLT" else ""
        table.add_row(Text(row.label), Text(row.value, style=style), Text(row.note))
    return table


def visible(text: str) -> str:
    """The text with control characters, half surrogates and the like as escapes; newlines and tabs stay."""
    hidden = ("Cc", "Cf", "Cs", "Cn")
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in hidden and c not in "\n\t" else c
        for c in text
    )


def _dataset_rows(run: Run) -> Iterator[Row]:
    dataset = run.documents or run.patches
    if dataset is None:
        return
    held_out = dataset.split("valid")
    note = f"{sum(shard.documents for shard in held_out):,} held out" if held_out else ""
    yield Row(label="Documents", value=f"{dataset.documents:,}", note=note)
    note = f"{sum(shard.bytes for shard in held_out):,} held out" if held_out else ""
    yield Row(label="Bytes", value=f"{dataset.bytes:,}", note=note)
    if lost := sum(count.quarantined + count.filtered + count.duplicates for count in dataset.counts.values()):
        yield Row(label="Rows left out", value=f"{lost:,}", note="quarantined, filtered or duplicates")


def _patch_rows(run: Run) -> Iterator[Row]:
    manifest, patches = run.patches, _patches(run.patches)
    if manifest is not None and manifest.patching is not None:
        rule = manifest.patching.rule
        yield Row(label="Patches", value=f"{patches:,}")
        if patches:
            yield Row(label="Mean patch size", value=f"{manifest.bytes / patches:.3f} bytes", note="whole dataset")
        if rule.kind == "entropy":
            note = "rise of the next-byte entropy" if rule.monotonic else "next-byte entropy"
            yield Row(label="Threshold", value=f"{rule.threshold:.4f} nats", note=note)
        else:
            yield Row(label="Patch rule", value=rule.kind)
    elif run.calibration is not None:
        note = f"for {run.calibration.mean_patch_bytes:.3f} bytes per patch"
        yield Row(label="Threshold", value=f"{run.calibration.threshold:.4f} nats", note=note)


def _bpb_rows(run: Run) -> Iterator[Row]:
    """Held-out bits per byte: of an evaluation, else what the trainings measured on their validation sequences."""
    evaluation = run.evaluation
    for row in reversed(comparisons(run)):
        note = "held-out text"
        if row.low is not None and row.high is not None:
            note += f", {row.low:.3f} to {row.high:.3f}"
        yield Row(label=row.name, value=f"{row.bpb:.3f} bpb", note=note)
    for part, name in (("entropy_model", "entropy model"), ("model", "BLT")):
        value = evaluation and (evaluation.bpb if part == "model" else evaluation.entropy_model_bpb)
        measured = [record["valid/bpb"] for record in run.metrics.get(part, ()) if "valid/bpb" in record]
        if value is None and measured:
            yield Row(label=name, value=f"{measured[-1]:.3f} bpb", note="validation sequences, end of training")


def _patches(manifest: Manifest | None) -> int:
    return sum(shard.patches or 0 for shard in manifest.shards) if manifest is not None else 0


def _stage_row(stage: StageFigures) -> StageRow:
    return StageRow(
        command=stage.command,
        seconds=f"{stage.seconds:,.1f}",
        bytes=f"{stage.bytes:,}" if stage.bytes is not None else "",
        bytes_per_second=_rate(stage.bytes_per_second),
        working_bytes_per_second=_rate(stage.working_bytes_per_second),
    )


def _rate(bytes_per_second: float | None) -> str:
    return f"{decimal(round(bytes_per_second))}/s" if bytes_per_second is not None else ""


def _stage_table(rows: list[StageRow]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("Stage", no_wrap=True)
    for title in ("seconds", "bytes", "bytes/s", "bytes/s at work"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        if row.command == "all":
            table.add_section()
        table.add_row(row.command, row.seconds, row.bytes, row.bytes_per_second, row.working_bytes_per_second)
    return table
