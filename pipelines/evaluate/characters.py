"""Character tasks asked of a model: a respondent and words in, the share of right answers to each task out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from blt.errors import ConfigError
from pipelines.evaluate.character_tasks import NO, TASKS, YES, Example, TaskName, examples, is_choice, prompt
from pipelines.evaluate.config import check_least
from pipelines.evaluate.respondent import Generation, Progress, Respondent
from pipelines.storage import Storage

RESULTS_PATH = "characters.json"
ANSWERS_PATH = "answers.jsonl"

_Z_95 = 1.959963984540054
"""97.5 % quantile of the normal distribution."""


@dataclass(frozen=True, kw_only=True)
class QuestionConfig:
    """Which questions are asked, and how many."""

    tasks: tuple[TaskName, ...] = TASKS
    """Which tasks."""
    examples: int = 100
    """Questions of each task."""
    shots: int = 4
    """Solved examples before each question; the same for all questions of a task, about other words."""
    phrase_words: int = 5
    """Words of a phrase, in tasks on words."""
    seed: int = 0
    """Of the words and what is asked of them."""

    def __post_init__(self) -> None:
        check_least(self, {"examples": 1, "shots": 0, "phrase_words": 2, "seed": 0})
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ConfigError(f"tasks must name at least one task, each once, got {', '.join(self.tasks) or 'none'}")


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """The share of right answers with its 95 % interval (Wilson's score interval)."""

    right: int
    asked: int
    share: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class TaskScores:
    """One task."""

    task: TaskName
    exact_match: Accuracy
    """Of what the model wrote up to the end of the line, without spaces around it."""
    likelier: Accuracy | None
    """Where the answer is yes or no: of the one that is likelier after the prompt, by all its bytes. Else None."""


@dataclass(frozen=True, kw_only=True)
class Answered:
    """One question and what became of it."""

    task: TaskName
    question: str
    answer: str
    written: str
    """By the model; bytes that are not UTF-8 stand as U+FFFD."""
    right: bool
    likelier: str | None


@dataclass(frozen=True, kw_only=True)
class Characters:
    """A model on character tasks."""

    tasks: tuple[TaskScores, ...]
    shots: int
    words: int
    """That questions were made of."""
    contexts_cut: int
    """Prompts that were longer than the model's windows."""
    model: str
    """Fingerprint of the BLT."""


def ask(
    respondent: Respondent, words: Sequence[str], config: QuestionConfig, progress: Progress | None = None
) -> list[Answered]:
    """Every question of every task, answered; `progress` is told of each. DataError for too few words."""
    shot_words, asked_words = split_words(words, config)
    found: list[Answered] = []
    for task in config.tasks:
        shots = examples(task, shot_words, config.shots, config.phrase_words, f"{config.seed} shots")
        asked = examples(task, asked_words, config.examples, config.phrase_words, f"{config.seed}")
        found += _ask_task(respondent, task, shots, asked)
        if progress is not None:
            progress(len(asked))
    return found


def split_words(words: Sequence[str], config: QuestionConfig) -> tuple[list[str], list[str]]:
    """Words for solved examples, just enough of them, and words for questions: a fixed deal of all of them."""
    needed = max(config.shots, 1) * config.phrase_words + 1
    step = max(1, len(words) // needed)
    shots = list(words[::step][:needed])
    held = set(shots)
    return shots, [word for word in words if word not in held]


def score(answered: Sequence[Answered], tasks: Sequence[TaskName]) -> tuple[TaskScores, ...]:
    """The share of right answers to each task."""
    scores = []
    for task in tasks:
        own = [answer for answer in answered if answer.task == task]
        likelier = [answer.likelier == answer.answer for answer in own if answer.likelier is not None]
        scores.append(
            TaskScores(
                task=task,
                exact_match=accuracy([answer.right for answer in own]),
                likelier=accuracy(likelier) if likelier else None,
            )
        )
    return tuple(scores)


def accuracy(right: Sequence[bool]) -> Accuracy:
    """Of at least one answer. Wilson 1927: the shares p for which the share found is at most z deviations away."""
    num_right, count, z = sum(right), len(right), _Z_95
    share = num_right / count
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2)) / (1 + z**2 / count)
    # What rounding leaves of 0 and 1 would be neither.
    low = middle - half if num_right > 0 else 0.0
    high = middle + half if num_right < count else 1.0
    return Accuracy(right=num_right, asked=count, share=share, low=low, high=high)


def write_characters(root: str, characters: Characters, answered: Sequence[Answered]) -> None:
    """Write `root`/answers.jsonl, then `root`/characters.json."""
    storage = Storage(root)
    storage.write_replace(ANSWERS_PATH, b"".join(msgspec.json.encode(answer) + b"\n" for answer in answered))
    storage.write_replace(RESULTS_PATH, msgspec.json.format(msgspec.json.encode(characters), indent=1) + b"\n")


def read_characters(root: str) -> Characters:
    """What `write_characters` wrote."""
    return msgspec.json.decode(Storage(root).read_bytes(RESULTS_PATH), type=Characters)


def _ask_task(
    respondent: Respondent, task: TaskName, shots: Sequence[Example], asked: Sequence[Example]
) -> list[Answered]:
    prompts = [prompt(shots, example.question).encode() for example in asked]
    # A space, the answer, and one byte more: a longer answer is wrong, whatever would follow.
    longest = max(len(example.answer.encode()) for example in asked) + 2
    written = respondent.continuations(prompts, Generation(max_new_bytes=longest, stop=(b"\n",)))
    likelier: Sequence[str | None] = [None] * len(asked)
    if is_choice(task):
        found = respondent.likelihoods([(text, f" {choice}".encode()) for text in prompts for choice in (YES, NO)])
        pairs = zip(found[::2], found[1::2], strict=True)
        likelier = [YES if yes.nats < no.nats else NO for yes, no in pairs]
    return [
        Answered(
            task=task,
            question=example.question,
            answer=example.answer,
            written=text.decode("utf-8", "replace"),
            right=text.strip(b" ") == example.answer.encode(),
            likelier=choice,
        )
        for example, text, choice in zip(asked, written, likelier, strict=True)
    ]
