"""The respondent: a language model that answers what evaluation tasks ask, in bytes.

Three questions: how likely a continuation is after a context, how likely a whole text is, how a prompt goes on. What is
too long for the model's windows is cut on the left, at the border of a character, and read as a document of its own;
how often that happened and how many bytes it took is counted.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from blt.checkpoint import LanguageModel
from blt.errors import ConfigError
from blt.generation import generate
from pipelines.evaluate.config import WindowConfig, check_least
from pipelines.evaluate.likelihood import TextScores, check_scorable, score_texts

Progress = Callable[[int], None]
"""Called with the number of further questions that are answered."""


@dataclass(frozen=True, kw_only=True)
class RespondentConfig(WindowConfig):
    """How questions are gathered and how much of them is read."""

    batch_prompts: int = 16
    """Prompts that are continued together; they differ in rounding from prompts continued alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, {"batch_prompts": 1})

    @property
    def text_bytes(self) -> int:
        """The longest text that is one window, as far as its bytes go: BOS and EOS stand beside it."""
        return max(1, self.sequence_bytes - 2)


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """Of a continuation."""

    nats: float
    """-ln p of all its bytes; 0 for an empty one."""
    greedy: bool
    """Whether greedy generation would have given it."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """How prompts are continued: greedily at temperature 0, until a stop string, EOS or the limit."""

    max_new_bytes: int
    stop: tuple[bytes, ...] = ()
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None


class Respondent:
    """Answers questions in batches of like length; an answer does not depend on the others, up to rounding.

    ConfigError for a model whose patches cannot be found online.
    """

    def __init__(self, lm: LanguageModel, config: RespondentConfig) -> None:
        check_scorable(lm)
        self.lm, self.config = lm, config
        self.num_cut = 0
        """Contexts and prompts that were cut."""
        self.bytes_cut = 0
        """Their bytes that were not read."""

    def likelihoods(self, pairs: Sequence[tuple[bytes, bytes]], progress: Progress | None = None) -> list[Likelihood]:
        """Of each continuation after its context. Without a context it follows BOS.

        Patches are those of both together, so one may span the border. A continuation longer than a window is read in
        several, each with context before it.
        """
        whole = [
            (self._cut(context, max(0, self.config.text_bytes - len(continuation))), continuation)
            for context, continuation in pairs
        ]
        found: dict[int, Likelihood] = {}
        for number, scores in self._scored([context + continuation for context, continuation in whole], progress):
            asked = slice(len(whole[number][0]), -1)
            found[number] = Likelihood(nats=float(scores.nats[asked].sum()), greedy=bool(scores.greedy[asked].all()))
        return [found[number] for number in range(len(pairs))]

    def text_nats(self, texts: Sequence[bytes], progress: Progress | None = None) -> list[float]:
        """-ln p of all bytes of each text, whatever its length: read in windows that overlap by half, as `blt eval`
        reads documents, but without the EOS that it charges.
        """
        found = {number: float(scores.nats[:-1].sum()) for number, scores in self._scored(texts, progress)}
        return [found[number] for number in range(len(texts))]

    def continuations(self, prompts: Sequence[bytes], how: Generation, progress: Progress | None = None) -> list[bytes]:
        """What follows each prompt, without the stop string. A prompt has room for what a window holds beside
        `max_new_bytes`, at least half a window.
        """
        if how.max_new_bytes < 0:
            raise ConfigError(f"max_new_bytes must be at least 0, got {how.max_new_bytes}")
        room = max(self.config.text_bytes - how.max_new_bytes, self.config.text_bytes // 2)
        cut = [self._cut(prompt, room) for prompt in prompts]
        order = _longest_first(cut)
        found: dict[int, bytes] = {}
        for start in range(0, len(order), self.config.batch_prompts):
            numbers = order[start : start + self.config.batch_prompts]
            answers = generate(
                self.lm,
                [cut[number] for number in numbers],
                max_new_bytes=how.max_new_bytes,
                temperature=how.temperature,
                top_k=how.top_k,
                top_p=how.top_p,
                seed=how.seed,
                stop=how.stop,
            )
            assert isinstance(answers, list)  # for a list of prompts
            found |= zip(numbers, answers, strict=True)
            _tell(progress, len(numbers))
        return [found[number] for number in range(len(prompts))]

    def _scored(self, texts: Sequence[bytes], progress: Progress | None) -> Iterator[tuple[int, TextScores]]:
        """The number and the scores of each text, the longest first."""
        order = _longest_first(texts)
        for number, scores in zip(order, score_texts(self.lm, [texts[i] for i in order], self.config), strict=True):
            yield number, scores
            _tell(progress, 1)

    def _cut(self, text: bytes, most_bytes: int) -> bytes:
        """The end of a text, counted if it is not all of it."""
        kept = last_characters(text, most_bytes)
        if len(kept) < len(text):
            self.num_cut += 1
            self.bytes_cut += len(text) - len(kept)
        return kept


def last_characters(text: bytes, most_bytes: int) -> bytes:
    """The longest end of `text` of at most so many bytes that begins with a character of UTF-8.

    Up to three continuation bytes are dropped; where there are more, the text is not UTF-8, and is cut at the byte.
    """
    if len(text) <= most_bytes:
        return text
    start = len(text) - most_bytes
    near = range(start, min(start + 4, len(text) + 1))
    borders = (place for place in near if place == len(text) or text[place] & 0xC0 != 0x80)
    return text[next(borders, start) :]


def _longest_first(texts: Sequence[bytes]) -> list[int]:
    """Places of the texts, equal ones together: batches of like length need little padding."""
    return sorted(range(len(texts)), key=lambda number: (-len(texts[number]), texts[number]))


def _tell(progress: Progress | None, count: int) -> None:
    if progress is not None:
        progress(count)
