"""What a latent transformer takes from a Llama, as a table for a terminal: names there and here, what is left out."""

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from blt.interop.llama import LlamaBlocks
from pipelines.train.config import TrainConfig
from pipelines.train.start import resolved


def print_latent_start(llama: LlamaBlocks, config: TrainConfig, console: Console | None = None) -> None:
    """Print the layer map and what is not in it, to standard output unless told otherwise."""
    console, layers = console or Console(), llama.shape.layers
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("Llama: layers.N", no_wrap=True)
    table.add_column("BLT: latent.blocks.N", no_wrap=True)
    table.add_column("shape", justify="right", no_wrap=True)
    for theirs, ours, shape in llama.layer_map():
        table.add_row(Text(theirs), Text(ours), Text(" x ".join(map(str, shape))))
    title = f"Latent transformer from {config.init_latent_from}: {layers} layers, N = 0 to {layers - 1}"
    console.print(Text(title, style="bold"), soft_wrap=True)
    console.print(table)
    scale = resolved(config).optimizer.latent_lr_scale
    for line in (
        f"{llama.parameters:,} parameters taken; learning rate of the latent transformer: {scale:g} x that of the rest",
        "rows of queries and keys stand in another order here: rotary pairs are neighbours",
        f"left out: {', '.join(llama.left_out) or 'nothing'}",
    ):
        console.print(Text(line), soft_wrap=True)
