"""Write one self-contained HTML page about a run: figures, text coloured by patch, curves, a sample, provenance.

Every part of a run may be missing: a patch dataset or a training alone has a report too. Opens without network.
"""

import dataclasses
import hashlib
import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from blt.checkpoint import load_entropy_model
from blt.entropy_model import document_entropies
from blt.errors import ConfigError, DataError
from jobs.configuration import to_plain
from jobs.page import template_fingerprint, write_page
from jobs.progress import progress
from jobs.record import JobResult
from jobs.report_page import PatchView, render
from jobs.report_patches import Passage, patch_lengths, read_passage
from jobs.report_run import COMMANDS, MODEL_CONFIG_PATH, Run, read_run, run_directories
from pipelines.model_files import local_model, model_fingerprint
from pipelines.storage import Storage

logger = logging.getLogger(__name__)

OPTIONS = ("model",)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Keys of `blt report`."""

    run: str | None = None
    """Directory of a run, laid out as by `blt quickstart`: documents, entropy_model, ..., sample below it."""
    documents: str | None = None
    """Output of `blt shard`; this and the next keys go before the directories of that name below `run`."""
    entropy_model: str | None = None
    """Output of `blt train-entropy`."""
    calibration: str | None = None
    """Output of `blt calibrate`."""
    patches: str | None = None
    """Output of `blt patch`."""
    model: str | None = None
    """Output of `blt train`."""
    evaluation: str | None = None
    """Output of `blt eval`."""
    sample: str | None = None
    """Output of `blt generate`."""
    output: str
    """The HTML file to write; one that is there is replaced."""
    title: str | None = None
    """Title of the page; null takes the name of the run's directory."""
    passage_bytes: int = 1600
    """About how many bytes of held-out text are shown with their patches."""
    passage_document: str | None = None
    """doc_id of the document that they are from; null takes the first held-out one that is long enough."""
    passage_offset: int = 0
    """Where in the document they start, in bytes."""

    def __post_init__(self) -> None:
        if not 1 <= self.passage_bytes <= 100_000:
            raise ConfigError(f"passage_bytes must be from 1 to 100000, got {self.passage_bytes}")
        if self.passage_offset < 0:
            raise ConfigError(f"passage_offset must be at least 0, got {self.passage_offset}")
        if self.run is None and not self.given:
            raise ConfigError(f"run must be given, or at least one of {', '.join(COMMANDS)}")

    @property
    def given(self) -> dict[str, str]:
        """The parts that have a directory of their own."""
        return {name: value for name in COMMANDS if (value := getattr(self, name)) is not None}


def run(config: Config) -> JobResult:
    """Write the page, unless the one that is there was made from the same."""
    started = time.monotonic()
    found = read_run((run_directories(config.run) if config.run is not None else {}) | config.given)
    _check(config, found)
    fingerprint = _fingerprint(config, found)
    if _is_current(Path(config.output), fingerprint):
        logger.info("done before, skipped path=%s", config.output)
        return JobResult(status="skipped", seconds=round(time.monotonic() - started, 3), path=config.output)
    left_out = [f"{name} ({root}: nothing of `blt {COMMANDS[name]}`)" for name, root in found.missing.items()]
    view = _patch_view(config, found, left_out)
    for what in left_out:
        logger.info("left out: %s", what)
    page = render(found, config.title or _title(config), view, left_out, fingerprint)
    write_page(config.output, page)
    return JobResult(
        seconds=round(time.monotonic() - started, 3),
        path=config.output,
        figures={"page_bytes": len(page.encode()), "parts_left_out": len(found.missing)},
    )


def _check(config: Config, found: Run) -> None:
    """DataError for a part that was asked for by its own key and is not there, or if there is none at all."""
    for name in config.given:
        if name in found.missing:
            raise DataError(f"{name} {found.missing[name]} holds nothing of `blt {COMMANDS[name]}`")
    if not found.directories:
        raise DataError(f"run {config.run} holds nothing to report: none of {', '.join(COMMANDS)}")


def _patch_view(config: Config, found: Run, left_out: list[str]) -> PatchView | None:
    """Patch lengths and passage of the patch dataset; adds to `left_out` why there is no entropy curve."""
    if found.patches is None:
        return None
    root = found.directories["patches"]
    with progress("report", total=found.patches.bytes, unit="bytes") as bar:
        lengths = patch_lengths(root, found.patches, bar.advance)
    passage = read_passage(
        root,
        found.patches,
        num_bytes=config.passage_bytes,
        document=config.passage_document,
        offset=config.passage_offset,
    )
    entropies = _entropies(found, passage, left_out) if passage is not None else None
    return PatchView(lengths=lengths, passage=passage, entropies=entropies)


def _entropies(found: Run, passage: Passage, left_out: list[str]) -> tuple[float, ...] | None:
    """Entropies of the distributions that the passage's bytes were drawn from, by the model that made the patches."""
    assert found.patches is not None
    patching = found.patches.patching
    if patching is None or patching.entropy_model is None:
        left_out.append("entropy curve (the patch rule needs no entropies)")
        return None
    root = found.directories.get("entropy_model")
    if root is None or not Storage(root).exists(MODEL_CONFIG_PATH):
        left_out.append("entropy curve (no entropy model)")
        return None
    directory = f"{root}/{Path(MODEL_CONFIG_PATH).parent}"
    if model_fingerprint(directory) != patching.entropy_model:
        left_out.append(f"entropy curve ({directory} is not the entropy model that made the patches)")
        return None
    model = load_entropy_model(local_model(directory), dtype=getattr(torch, patching.dtype)).eval()
    read = passage.before + passage.text
    values = document_entropies(model, [read], reset_on_newline=patching.reset_on_newline)[0]
    return tuple(values[len(passage.before) : len(read)].tolist())


def _title(config: Config) -> str:
    return Path(config.run).resolve().name if config.run is not None else "run"


def _fingerprint(config: Config, found: Run) -> str:
    """Of everything that the page is made from."""
    plain = to_plain(dataclasses.replace(config, output=""))
    text = json.dumps([plain, found.fingerprint, template_fingerprint()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _is_current(output: Path, fingerprint: str) -> bool:
    """Whether the page there says, among its first lines, that it was made from the same."""
    try:
        with output.open(encoding="utf-8") as file:
            return fingerprint in file.read(2000)
    except (OSError, UnicodeDecodeError):
        return False
