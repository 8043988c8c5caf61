"""Continue a prompt with a trained BLT: the continuation goes to standard output, on a terminal byte by byte.

Patches are found on the way, by the model's own entropy model and rule. With `output`, sample.json is written there.
"""

import codecs
import json
import secrets
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from blt.checkpoint import LanguageModel, language_model_fingerprint, load
from blt.errors import ConfigError
from blt.generation import stream
from jobs.record import JobResult, run_once
from pipelines.evaluate.utf8 import is_utf8
from pipelines.storage import Storage

SAMPLE_NAME = "sample.json"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A sample, apart from its paths."""

    prompt: str = ""
    """Text that opens the document; empty begins one."""
    max_new_bytes: int = 256
    """Longest continuation in bytes; it ends earlier where the model ends the document."""
    temperature: float = 0.8
    """0 takes the most likely byte; higher draws more freely."""
    top_k: int | None = None
    """Draw from the k most likely bytes only."""
    top_p: float | None = None
    """Draw from the fewest bytes that hold this probability together."""
    seed: int | None = None
    """Of the draws; null takes a fresh one, which the result names."""
    stop: tuple[str, ...] = ()
    """Texts before which the continuation ends."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the model runs."""

    def __post_init__(self) -> None:
        if self.max_new_bytes < 0:
            raise ConfigError(f"max_new_bytes must be at least 0, got {self.max_new_bytes}")


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """Keys of `blt generate`."""

    model: str
    """Directory of the trained model (`blt train` writes it as OUTPUT/model)."""
    output: str | None = None
    """Directory that gets sample.json; null only prints."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The content of sample.json."""

    prompt: str
    text: str
    """The continuation; bytes that are not UTF-8 stand as U+FFFD."""
    bytes: int
    """Of the continuation, as generated."""
    valid_utf8: bool
    seconds: float
    """From the prompt's first byte to the continuation's last, without loading the model."""
    bytes_per_second: float
    seed: int
    temperature: float
    top_k: int | None
    top_p: float | None
    model: str
    """Fingerprint of the BLT."""


def run(config: Config) -> JobResult:
    """Print a continuation; with `config.output`, record it there, or print the one that is recorded."""
    if config.output is None:
        return _result(_sample(config))
    root, inputs = config.output, f"model={language_model_fingerprint(config.model)}"

    def work() -> JobResult:
        sample = _sample(config)
        text = json.dumps(asdict(sample), ensure_ascii=False, indent=1) + "\n"
        Storage(root).write_replace(SAMPLE_NAME, text.encode("utf-8", "replace"))
        return _result(sample)

    result = run_once(root, config, inputs, work, ignore=("output", "model", "device"))
    if result.status == "skipped":
        recorded = json.loads((Path(root) / SAMPLE_NAME).read_text(encoding="utf-8"))
        print(recorded["text"], flush=True)
    return result


def _sample(config: Config) -> Sample:
    """Load the model, generate and print."""
    language_model = load(config.model, device=config.device)
    seed = secrets.randbits(32) if config.seed is None else config.seed
    started = time.perf_counter()
    pieces: list[bytes] = []
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for piece in _pieces(language_model, config, seed):
        pieces.append(piece)
        if sys.stdout.isatty():
            print(decoder.decode(piece), end="", flush=True)
    seconds, data = time.perf_counter() - started, b"".join(pieces)
    text = data.decode("utf-8", "replace")
    print(decoder.decode(b"", final=True) if sys.stdout.isatty() else text, flush=True)
    return Sample(
        prompt=config.prompt,
        text=text,
        bytes=len(data),
        valid_utf8=is_utf8(data),
        seconds=round(seconds, 3),
        bytes_per_second=round(len(data) / seconds, 1) if seconds else 0.0,
        seed=seed,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        model=language_model_fingerprint(config.model),
    )


def _pieces(language_model: LanguageModel, config: Config, seed: int) -> Iterator[bytes]:
    return stream(
        language_model,
        config.prompt.encode("utf-8", "surrogateescape"),
        max_new_bytes=config.max_new_bytes,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        seed=seed,
        stop=[text.encode("utf-8", "surrogateescape") for text in config.stop],
    )


def _result(sample: Sample) -> JobResult:
    return JobResult(
        seconds=sample.seconds,
        bytes=sample.bytes,
        figures={"bytes_per_second": sample.bytes_per_second, "seed": sample.seed},
    )
