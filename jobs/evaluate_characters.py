"""Questions about the letters of words, asked of a trained BLT: spell, find, insert, delete, substitute, swap. Offline.

In the style of CUTE (arXiv 2409.15452), with words from a text of yours and our own wording, so the figures are not
those of CUTE. The model sees solved examples, then a question; what it writes up to the end of the line must be the
answer to the letter. Where the answer is yes or no, the likelier of the two is scored as well.
"""

import hashlib
from dataclasses import dataclass
from typing import Literal

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from blt.checkpoint import language_model_fingerprint, load
from blt.errors import ConfigError
from jobs.progress import progress
from jobs.record import JobResult, run_once
from pipelines.evaluate.characters import (
    Accuracy,
    Characters,
    QuestionConfig,
    ask,
    read_characters,
    score,
    write_characters,
)
from pipelines.evaluate.config import check_least
from pipelines.evaluate.respondent import Respondent, RespondentConfig
from pipelines.evaluate.words import common_words, read_texts
from pipelines.model_files import local_model
from pipelines.shard.config import SourceConfig

NOT_IN_OUTPUT = ("output", "model", "words", "text_key", "words_bytes", "min_letters", "max_letters", "most_words")
"""Keys that have no say in the output besides the words and the model, whose content the inputs' fingerprint covers."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

OPTIONS = ("model",)


@dataclass(frozen=True, kw_only=True)
class Config(QuestionConfig, RespondentConfig):
    """Keys of `blt eval characters`."""

    model: str
    """Directory of the trained model (`blt train` writes it as OUTPUT/model)."""
    output: str | None = None
    """Directory that gets characters.json and answers.jsonl; null only prints."""
    words: tuple[str, ...] = ("data/state_of_the_union.jsonl.zst",)
    """Files, globs or directories of text to take words from, as of `blt shard`."""
    text_key: str = "text"
    """JSON key or Parquet column that holds the text."""
    words_bytes: int = 16 * 2**20
    """Text to read of them; the rest is passed over."""
    min_letters: int = 4
    """Shortest word."""
    max_letters: int = 8
    """Longest word."""
    most_words: int = 2000
    """Take the commonest so many."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the models run."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of both models' weights."""

    def __post_init__(self) -> None:
        QuestionConfig.__post_init__(self)
        RespondentConfig.__post_init__(self)
        check_least(self, {"words_bytes": 1, "min_letters": 2, "most_words": 1})
        if self.max_letters < self.min_letters:
            raise ConfigError(f"max_letters must be at least min_letters={self.min_letters}, got {self.max_letters}")
        if not self.words:
            raise ConfigError("words must name at least one file, glob or directory")


def run(config: Config) -> JobResult:
    """Print a table of the tasks; with `config.output`, record them there unless that is done."""
    texts = read_texts(SourceConfig(name="words", input=config.words, text_key=config.text_key), config.words_bytes)
    words = common_words(texts, min_letters=config.min_letters, max_letters=config.max_letters, most=config.most_words)
    directory = local_model(config.model)
    model = language_model_fingerprint(directory)
    if config.output is None:
        return _evaluate(config, directory, model, words)
    inputs = f"model={model} words={hashlib.sha256(' '.join(words).encode()).hexdigest()}"

    def work() -> JobResult:
        return _evaluate(config, directory, model, words)

    result = run_once(config.output, config, inputs, work, ignore=NOT_IN_OUTPUT)
    if result.status == "skipped":
        _print(read_characters(config.output))
    return result


def _evaluate(config: Config, directory: str, model: str, words: tuple[str, ...]) -> JobResult:
    language_model = load(directory, device=config.device, dtype=_DTYPES[config.dtype])
    respondent = Respondent(language_model, config)
    with progress("eval characters", total=len(config.tasks) * config.examples, unit="questions") as bar:
        answered = ask(respondent, words, config, bar.advance)
    characters = Characters(
        tasks=score(answered, config.tasks),
        shots=config.shots,
        words=len(words),
        contexts_cut=respondent.num_cut,
        model=model,
    )
    if config.output is not None:
        write_characters(config.output, characters, answered)
    _print(characters)
    return _result(characters)


def _result(characters: Characters) -> JobResult:
    figures: dict[str, float | str | None] = {}
    for scores in characters.tasks:
        figures[scores.task] = round(scores.exact_match.share, 4)
        if scores.likelier is not None:
            figures[f"{scores.task}_likelier"] = round(scores.likelier.share, 4)
    if characters.contexts_cut:
        figures["contexts_cut"] = characters.contexts_cut
    return JobResult(documents=sum(scores.exact_match.asked for scores in characters.tasks), figures=figures)


def _print(characters: Characters) -> None:
    """A row for each task and way of scoring."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("Task", no_wrap=True)
    for title in ("asked", "right", "share", "95 % interval"):
        table.add_column(title, justify="right", no_wrap=True)
    for scores in characters.tasks:
        table.add_row(scores.task, *_cells(scores.exact_match))
        if scores.likelier is not None:
            table.add_row(f"{scores.task} (likelier)", *_cells(scores.likelier))
    Console().print(table)


def _cells(found: Accuracy) -> tuple[str, ...]:
    return f"{found.asked}", f"{found.right}", f"{found.share:.3f}", f"{found.low:.3f} to {found.high:.3f}"
