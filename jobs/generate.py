"""Continue prompts with a trained BLT: the continuation goes to standard output, byte by byte as it is found.

    blt generate model=runs/quickstart/model/model 'Once upon a time' --show-patches
    printf %s 'Once upon' | blt generate model=runs/quickstart/model/model -
    blt generate model=runs/quickstart/model/model --file prompts.txt --lines output=samples

Patches are found on the way, by the model's own entropy model and rule; --show-patches marks where they start. With
--lines every line is a prompt, and all are continued together: on a terminal one after the other, elsewhere a line of
JSON each. With `output` the samples are written there, and shown again by a second run.
"""

import hashlib
import logging
import secrets
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from blt.checkpoint import LanguageModel, language_model_fingerprint, load
from blt.errors import ConfigError
from blt.generation import Piece, continuations
from blt.sampling import Sampling
from jobs.record import JobResult, run_once
from jobs.sample import Sample, continuation, exact_base64, read_samples, samples_path, write_samples
from jobs.shown_text import ShownText, visible
from jobs.text_input import STANDARD_INPUT, argument_bytes, read_input
from pipelines.model_files import local_model
from pipelines.storage import Storage

logger = logging.getLogger(__name__)

POSITIONAL = ("prompt",)
OPTIONS = {"model": "model", "file": "prompt_file", "lines": "lines", "show-patches": "show_patches"}

_NOT_IN_OUTPUT = ("output", "model", "device", "prompt_file", "lines", "show_patches", "batch_prompts", "speculate")
"""Keys that have no say in the samples, or whose content the fingerprint of the inputs covers."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A sample, apart from its paths."""

    prompt: str = ""
    """Text that opens the document; empty begins one; - reads it from standard input."""
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
    prompt_file: str | None = None
    """File whose bytes are the prompt, a newline at its end included; - is standard input."""
    lines: bool = False
    """Every line is a prompt of its own, an empty one too; the newlines are no part of them."""
    batch_prompts: int = 16
    """Most prompts that are continued together."""
    speculate: bool = False
    """Read one prompt's document ahead of the entropy model: the same bytes, sooner where passes of that model are most
    of the time."""
    show_patches: bool = False
    """Mark where the patches of the continuation start; lines of JSON have that as patch_starts in any case."""
    output: str | None = None
    """Directory that gets sample.json, or with lines samples.jsonl; null only prints."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt_file is not None and self.prompt:
            raise ConfigError("prompt and prompt_file cannot both be given")
        if self.speculate and self.lines:
            raise ConfigError("speculate reads one document ahead, lines continues several together")
        if self.batch_prompts < 1:
            raise ConfigError(f"batch_prompts must be at least 1, got {self.batch_prompts}")


def run(config: Config) -> JobResult:
    """Print continuations; with `config.output`, record them there, or print those that are recorded."""
    if config.prompt == STANDARD_INPUT:
        config = replace(config, prompt="", prompt_file=STANDARD_INPUT)
    prompts, directory = _prompts(config), local_model(config.model)
    if config.output is None:
        return _result(*_generate(config, directory, prompts))
    root = config.output

    def work() -> JobResult:
        samples, seconds = _generate(config, directory, prompts)
        write_samples(root, samples, lines=config.lines)
        return _result(samples, seconds)

    result = run_once(
        root,
        config,
        _inputs(config, directory, prompts),
        work,
        ignore=_NOT_IN_OUTPUT,
        is_whole=lambda output: Storage(output).exists(samples_path(config.lines)),
    )
    if result.status == "skipped":
        for sample in read_samples(root, lines=config.lines):
            _show_again(config, sample)
    return result


def _prompts(config: Config) -> tuple[bytes, ...]:
    data = argument_bytes(config.prompt) if config.prompt_file is None else read_input(config.prompt_file).data
    if not config.lines:
        return (data,)
    prompts = tuple(data.removesuffix(b"\n").split(b"\n")) if data else ()
    if not prompts:
        raise ConfigError("lines: there is no line, so no prompt")
    return prompts


def _inputs(config: Config, directory: str, prompts: Sequence[bytes]) -> str:
    """What identifies the inputs: the model, and the prompts where the configuration does not hold them."""
    model = f"model={language_model_fingerprint(directory)}"
    if config.prompt_file is None and not config.lines:
        return model
    digest = hashlib.sha256(b"".join(b"%d:" % len(prompt) + prompt for prompt in prompts))
    return f"{model} prompts={digest.hexdigest()}"


def _generate(config: Config, directory: str, prompts: Sequence[bytes]) -> tuple[list[Sample], float]:
    """Load the model, generate and print; gives the seconds without loading."""
    language_model = load(directory, device=config.device)
    seed = secrets.randbits(32) if config.seed is None else config.seed
    writer = _SampleWriter(config, language_model, seed, language_model_fingerprint(directory))
    if not config.lines:
        sample = writer.stream(prompts[0])
        return [sample], sample.seconds
    samples, seconds = list[Sample](), 0.0
    for first in range(0, len(prompts), config.batch_prompts):
        batch = writer.together(prompts[first : first + config.batch_prompts])
        for sample in batch:
            _show_line(config, sample)
        samples += batch
        seconds += batch[0].seconds
        logger.info("generated prompts=%d of=%d", len(samples), len(prompts))
    return samples, seconds


class _SampleWriter:
    """Makes samples, each with what it was made with."""

    def __init__(self, config: Config, language_model: LanguageModel, seed: int, fingerprint: str) -> None:
        self._config, self._language_model, self._fingerprint = config, language_model, fingerprint
        self._sampling = Sampling(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, seed=seed)

    def stream(self, prompt: bytes) -> Sample:
        """The sample of one prompt, shown byte by byte."""
        started, pieces = time.perf_counter(), list[Piece]()
        shown = ShownText(patches=self._config.show_patches, escape=sys.stdout.isatty())
        try:
            for _, piece in self._pieces([prompt]):
                pieces.append(piece)
                print(shown.add(piece.data, piece.starts), end="", flush=True)
        finally:  # whatever happens, the result has a line of its own
            print(shown.end(), flush=True)
        return self._sample(prompt, pieces, time.perf_counter() - started)

    def together(self, prompts: Sequence[bytes]) -> list[Sample]:
        """The samples of several prompts."""
        started = time.perf_counter()
        found: list[list[Piece]] = [[] for _ in prompts]
        for index, piece in self._pieces(prompts):
            found[index].append(piece)
        seconds = time.perf_counter() - started
        return [self._sample(prompt, pieces, seconds) for prompt, pieces in zip(prompts, found, strict=True)]

    def _pieces(self, prompts: Sequence[bytes]) -> Iterator[tuple[int, Piece]]:
        return continuations(
            self._language_model,
            prompts,
            max_new_bytes=self._config.max_new_bytes,
            sampling=self._sampling,
            stop=[argument_bytes(text) for text in self._config.stop],
            speculate=self._config.speculate,
        )

    def _sample(self, prompt: bytes, pieces: Sequence[Piece], seconds: float) -> Sample:
        data = b"".join(piece.data for piece in pieces)
        starts = [starts_patch for piece in pieces for starts_patch in piece.starts]
        exact = exact_base64(data)
        assert self._sampling.seed is not None
        return Sample(
            prompt=prompt.decode("utf-8", "replace"),
            text=data.decode("utf-8", "replace"),
            bytes=len(data),
            valid_utf8=exact is None,
            prompt_base64=exact_base64(prompt),
            text_base64=exact,
            patch_starts=tuple(i for i, starts_patch in enumerate(starts) if starts_patch),
            seconds=round(seconds, 3),
            bytes_per_second=round(len(data) / seconds, 1) if seconds else 0.0,
            seed=self._sampling.seed,
            temperature=self._sampling.temperature,
            top_k=self._sampling.top_k,
            top_p=self._sampling.top_p,
            model=self._fingerprint,
        )


def _show_line(config: Config, sample: Sample) -> None:
    """One of several samples: a paragraph for a person, a line of JSON for a program."""
    if sys.stdout.isatty():
        print(f"> {visible(sample.prompt)}\n{_shown(config, sample)}\n", flush=True)
    else:
        print(sample.to_json(), flush=True)


def _show_again(config: Config, sample: Sample) -> None:
    """A sample that is recorded, as it was shown when it was made."""
    if config.lines:
        _show_line(config, sample)
    else:
        print(_shown(config, sample), flush=True)


def _shown(config: Config, sample: Sample) -> str:
    data, known = continuation(sample), sample.patch_starts is not None
    if config.show_patches and not known:
        logger.warning("patches are not shown: the recorded sample was written without them")
    starts = set(sample.patch_starts or ())
    text = ShownText(patches=config.show_patches and known, escape=sys.stdout.isatty())
    return text.add(data, [i in starts for i in range(len(data))]) + text.end()


def _result(samples: Sequence[Sample], seconds: float) -> JobResult:
    num_bytes = sum(sample.bytes for sample in samples)
    figures: dict[str, float | str | None] = {
        "bytes_per_second": round(num_bytes / seconds, 1) if seconds else 0.0,
        "seed": samples[0].seed,
    }
    if len(samples) > 1:
        figures["prompts"] = len(samples)
    elif samples[0].text_base64 is not None:
        figures["text_base64"] = samples[0].text_base64
    return JobResult(seconds=round(seconds, 3), bytes=num_bytes, figures=figures)
