"""Show how a model cuts a text into patches, over the entropies that decide it: in the terminal and as an HTML page.

    blt inspect model=runs/quickstart/model/model 'It was the best of times'
    blt inspect model=runs/quickstart/model/model book.txt --html book.html

INPUT is a text, the path of a file (any bytes), or - for standard input. In the terminal each line of text stands over
its entropies; the page has a slider that cuts the text again at another threshold.
"""

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from blt.errors import ConfigError
from blt.patching import PatchRule
from jobs.inspect_page import inspection_page
from jobs.inspect_terminal import print_inspection
from jobs.page import write_page
from jobs.patched_text import PatchedText
from jobs.patcher import load_patcher
from jobs.record import JobResult
from jobs.text_input import STANDARD_INPUT, TextInput, argument_bytes, is_file, read_input

logger = logging.getLogger(__name__)

POSITIONAL = ("input",)
OPTIONS = ("model", "html", "max_bytes", "threshold")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Keys of `blt inspect`."""

    model: str
    """Directory of a trained model, or of an entropy model alone, which needs a threshold or a rule."""
    input: str
    """The text; or the path of a file, where there is one of that name; or -, which is standard input."""
    html: str | None = None
    """The HTML file to write; one that is there is replaced. null writes none."""
    threshold: float | None = None
    """Entropy (nats) above which a patch starts, in place of the rule's."""
    rule: PatchRule | None = None
    """How text is cut, in place of the whole rule of the model; null takes that."""
    reset_on_newline: bool | None = None
    """Open a new entropy-model context after each newline byte; null does as the model's patches were made."""
    max_bytes: int = 32768
    """Most bytes that are read; of a longer input the first ones, and what is left out is said."""
    print_bytes: int = 4096
    """Most bytes that are shown in the terminal; figures and page have all that were read."""
    longest: int = 5
    """How many of the longest patches are listed."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the entropy model runs."""

    def __post_init__(self) -> None:
        for name, least in (("max_bytes", 1), ("print_bytes", 0), ("longest", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")


def run(config: Config) -> JobResult:
    """Patch the text, write the page if one is asked for, and print."""
    started = time.monotonic()
    name, given = _read(config)
    patcher = load_patcher(
        config.model,
        rule=config.rule,
        threshold=config.threshold,
        reset_on_newline=config.reset_on_newline,
        device=config.device,
    )
    patched, left_out = patcher.patch(given.data), _left_out(config, given)
    if config.html is not None:
        write_page(config.html, inspection_page(patched, name, left_out, config.longest))
    print_inspection(Console(), patched, name, left_out, print_bytes=config.print_bytes, longest=config.longest)
    return _result(config, patched, given, time.monotonic() - started)


def _read(config: Config) -> tuple[str, TextInput]:
    """What the input is called, and its bytes."""
    if config.input == STANDARD_INPUT:
        return "standard input", read_input(config.input, config.max_bytes)
    if is_file(config.input):
        if config.html is not None and Path(config.html).resolve() == Path(config.input).resolve():
            raise ConfigError(f'key "html": {config.html} is the input itself')
        return config.input, read_input(config.input, config.max_bytes)
    data, most = argument_bytes(config.input), config.max_bytes
    return "text of the command line", TextInput(data=data[:most], left_out_bytes=max(len(data) - most, 0))


def _left_out(config: Config, given: TextInput) -> str | None:
    """In words what was not read, None if all was."""
    if given.left_out_bytes == 0:
        return None
    count = f"{given.left_out_bytes:,} bytes" if given.left_out_bytes is not None else "an unknown number of bytes"
    text = f"{count} after the first {config.max_bytes:,} (max_bytes); the last patch shown may go on"
    logger.warning("left out: %s", text)
    return text


def _result(config: Config, patched: PatchedText, given: TextInput, seconds: float) -> JobResult:
    figures: dict[str, float | str | None] = {"left_out_bytes": given.left_out_bytes}
    if patched.mean_nats is not None:
        figures["mean_entropy_nats"] = round(patched.mean_nats, 4)
    if patched.text:
        figures["longest_patch_bytes"] = len(patched.longest(1)[0].data)
    mean = patched.mean_patch_bytes
    return JobResult(
        seconds=round(seconds, 3),
        path=config.html,
        bytes=len(patched.text),
        patches=patched.num_patches,
        mean_patch_bytes=round(mean, 4) if mean is not None else None,
        threshold=patched.rule.threshold if patched.rule.kind == "entropy" else None,
        figures=figures,
    )
