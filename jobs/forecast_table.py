"""A forecast as tables for a terminal: the model by part, the run, memory, numbers of workers, traffic."""

from collections.abc import Iterator

from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from jobs.report_table import Row, duration, row_table
from pipelines.train.forecast import Forecast
from pipelines.train.run_sizes import MicroBatch


def print_forecast(found: Forecast, console: Console | None = None) -> None:
    """Print the tables of a forecast, to standard output unless told otherwise."""
    console, config = console or Console(), found.config
    for title, table in (
        ("", _parts_table(found)),
        ("", row_table(_run_rows(found))),
        (f"Memory of each of {config.workers} workers, {config.survival}", row_table(_memory_rows(found))),
        ("The same with other numbers of workers", _worlds_table(found)),
        ("Bytes that a worker sends in an update", row_table(_traffic_rows(found))),
    ):
        if title:
            console.print(Text(title, style="bold"))
        console.print(table)


def _parts_table(found: Forecast) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("Part", no_wrap=True)
    for title in ("parameters", "share", "FLOPs/byte", "share"):
        table.add_column(title, justify="right", no_wrap=True)
    parameters, flops = sum(found.parameters.values()), sum(found.flops_per_byte.values())
    for part in found.parameters:
        own, own_flops = found.parameters[part], found.flops_per_byte[part]
        shares = f"{100 * own / parameters:.1f} %", f"{100 * own_flops / flops:.1f} %"
        table.add_row(part.replace("_", " "), f"{own:,}", shares[0], f"{own_flops:.4g}", shares[1])
    table.add_section()
    table.add_row("all, in training", f"{parameters:,}", "", f"{flops:.4g}", "")
    return table


def _run_rows(found: Forecast) -> Iterator[Row]:
    config, machine = found.config, found.machine
    yield Row(label="Steps", value=f"{config.steps:,}", note=f"estimated: {found.steps_per_epoch:,.1f} an epoch")
    note = f"estimated: {decimal(found.step_bytes)} an update of {config.global_batch:,} sequences"
    yield Row(label="Bytes", value=decimal(found.bytes), note=note)
    for name, epochs in found.reading.epochs.items():
        source = found.sources[name]
        note = f"estimated: of {name}, {source.sequences:,} sequences of {decimal(source.bytes)}"
        yield Row(label="Epochs", value=f"{epochs:,.3g}", note=note)
    note = f"of a worker in an update; usual: {_shape(found.usual)}"
    yield Row(label="Micro-batches", value=f"{found.micro_steps:,}", note=note)
    speed = f"{machine.flops / 1e12:,.4g} TFLOP/s ({machine.flops_source})"
    note = f"estimated: {config.workers} x {machine.name} of {speed} at an MFU of {found.mfu:g}"
    yield Row(label="Time", value=duration(found.seconds), note=note)


def _memory_rows(found: Forecast) -> Iterator[Row]:
    config, memory, micro = found.config, found.world.memory, found.most
    working = memory.working
    yield _bytes_row("Weights", memory.weights, "float32")
    yield _bytes_row("Gradients", memory.gradients, "float32")
    yield _bytes_row("Moments", memory.moments, "float32, AdamW")
    yield _bytes_row("Working", working.total, f"at the fullest moment of a micro-batch: {working.name}")
    recomputed = f"activation_checkpointing={config.activation_checkpointing}"
    notes = {
        "gathered_weights": "what is in no block, the block at work, the next one",
        "gathered_gradients": "on their way to the workers that keep them",
        "activations": f"of {_shape(micro)}, the most there may be; {recomputed}",
        "lookups": "in n-gram tables: row numbers",
        "table_gradient": "of a micro-batch, before it is added to those before it",
    }
    for part, note in notes.items():
        if num_bytes := getattr(working, part):
            yield _bytes_row(f"  {part.replace('_', ' ')}", num_bytes, note)
    yield _bytes_row("All", memory.total, _fits(found) + (", torch.compile not counted" if config.compile else ""))
    if found.usual != micro:
        note = f"at most, of {_shape(found.usual)}"
        yield _bytes_row("Usual activations", found.usual.activations.peak, note)


def _fits(found: Forecast) -> str:
    machine = found.machine
    if machine.memory_bytes is None:
        return f"memory of {machine.name} not known"
    return f"{'fits' if found.world.fits else 'does NOT fit'} {machine.name} of {_size(machine.memory_bytes)}"


def _worlds_table(found: Forecast) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for title in ("workers", "state", "working", "all", f"fits {found.machine.name}"):
        table.add_column(title, justify="right", no_wrap=True)
    for world in found.shown_worlds:
        memory, fits = world.memory, {True: "yes", False: "no", None: "unknown"}[world.fits]
        sizes = (_size(memory.state), _size(memory.working.total), _size(memory.total))
        table.add_row(f"{world.workers:,}", *sizes, fits, style="bold" if world.workers == found.world.workers else "")
    if found.machine.memory_bytes is not None:
        least = found.smallest_fitting
        table.caption = f"fewest that fit: {'none of these' if least is None else least}"
    return table


def _traffic_rows(found: Forecast) -> Iterator[Row]:
    traffic, tables = found.traffic, found.traffic.tables
    if traffic.weights:
        yield _bytes_row("Weights", traffic.weights, "gathered")
    yield _bytes_row("Gradients", traffic.gradients, "summed in float32")
    if tables.by_columns:
        note = f"sums of rows; {_size(tables.row_numbers)} of it row numbers"
        yield _bytes_row("N-gram tables", tables.by_columns, note)
    yield _bytes_row("All", traffic.total, "")
    if tables.by_columns:
        yield _bytes_row("N-gram tables as FSDP", tables.gathered, "if they were gathered like other weights")
        yield _bytes_row("N-gram tables by rows", tables.by_rows, "if rows were sent instead of sums")


def _shape(batch: MicroBatch) -> str:
    patches = "" if batch.shape.patches is None else f" and {batch.shape.patches:,} patches"
    return f"{batch.rows} row{'s' if batch.rows > 1 else ''} of {batch.shape.bytes:,} bytes{patches}"


def _bytes_row(label: str, num_bytes: float, note: str) -> Row:
    return Row(label=label, value=_size(num_bytes), note=note)


def _size(num_bytes: float) -> str:
    return decimal(round(num_bytes))
