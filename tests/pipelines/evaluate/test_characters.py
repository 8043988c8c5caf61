"""Character tasks asked of a model: one that reads the question scores all, one that does not scores none."""

import math
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from blt.errors import ConfigError, DataError
from pipelines.evaluate.character_tasks import TASKS
from pipelines.evaluate.characters import (
    Characters,
    QuestionConfig,
    accuracy,
    ask,
    read_characters,
    score,
    split_words,
    write_characters,
)
from pipelines.evaluate.respondent import Generation, Likelihood, Respondent, RespondentConfig
from tests.pipelines.evaluate.test_character_tasks import MANY, solve
from tests.small_language_model import small_language_model


class Reader:
    """Answers prompts from their last question, and checks that those before it are solved."""

    def __init__(self, wrong: bool = False) -> None:
        self.wrong = wrong
        self.prompts: list[str] = []

    def _answer(self, data: bytes) -> str:
        self.prompts.append(data.decode())
        *solved, (question, _) = re.findall(r"Question: (.*)\nAnswer:(.*)", data.decode())
        assert all(answer == f" {solve(shot)}" for shot, answer in solved)
        answer = solve(question)
        if self.wrong:
            answer = {"yes": "no", "no": "yes"}.get(answer, answer + "s")
        return answer

    def continuations(self, prompts: Sequence[bytes], how: Generation) -> list[bytes]:
        assert how.stop == (b"\n",)
        found = [f" {self._answer(prompt)}".encode() for prompt in prompts]
        assert self.wrong or max(len(answer) for answer in found) < how.max_new_bytes
        return [answer[: how.max_new_bytes] for answer in found]

    def likelihoods(self, pairs: Sequence[tuple[bytes, bytes]]) -> list[Likelihood]:
        right = [continuation.decode() == f" {self._answer(prompt)}" for prompt, continuation in pairs]
        return [Likelihood(nats=1.0 if is_right else 2.0, greedy=is_right) for is_right in right]


def test_who_reads_the_questions_answers_them() -> None:
    config, reader, told = QuestionConfig(examples=7, shots=3, phrase_words=3), Reader(), list[int]()
    answered = ask(reader, MANY, config, told.append)
    scores = score(answered, config.tasks)
    assert [found.task for found in scores] == list(TASKS)
    assert all(found.exact_match.right == found.exact_match.asked == 7 for found in scores)
    likelier = {found.task: found.likelier for found in scores if found.likelier is not None}
    assert set(likelier) == {"contains_char", "contains_word"}
    assert all(found.share == 1 for found in likelier.values())
    assert sum(told) == 7 * len(TASKS)
    assert all(text.count("Question: ") == 4 for text in reader.prompts)


def test_one_letter_more_is_wrong() -> None:
    """Also in the longest answer, of which the limit cuts what follows."""
    scores = score(ask(Reader(wrong=True), MANY, QuestionConfig(examples=6, phrase_words=3)), TASKS)
    assert all(found.exact_match.right == 0 for found in scores)
    assert all(found.likelier.right == 0 for found in scores if found.likelier is not None)


def test_solved_examples_are_about_other_words() -> None:
    shots, asked = split_words(MANY, QuestionConfig(shots=2, phrase_words=3))
    assert len(shots) == 7
    assert sorted([*shots, *asked]) == sorted(MANY)


@pytest.mark.parametrize(("right", "asked"), [(0, 10), (3, 10), (50, 100), (10, 10)])
def test_the_interval_is_wilsons(right: int, asked: int) -> None:
    """Its ends are the shares from which the one found is 1.96 standard deviations away."""
    found = accuracy([True] * right + [False] * (asked - right))
    assert (found.right, found.asked, found.share) == (right, asked, right / asked)
    for end in (found.low, found.high):
        if 0 < end < 1:
            assert abs(found.share - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / asked), rel=1e-6)
    assert found.low <= found.share <= found.high
    assert (found.low > 0) == (right > 0)
    assert (found.high < 1) == (right < asked)


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    config = QuestionConfig(tasks=("contains_char", "spell"), examples=3)
    respondent = Respondent(small_language_model(), RespondentConfig())
    answered = ask(respondent, MANY, config)
    scores = score(answered, config.tasks)
    characters = Characters(tasks=scores, shots=4, words=len(MANY), contexts_cut=0, model="m")
    write_characters(str(tmp_path), characters, answered)
    assert read_characters(str(tmp_path)) == characters
    assert len((tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()) == 6


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="tasks must name"):
        QuestionConfig(tasks=("spell", "spell"))
    with pytest.raises(ConfigError, match="phrase_words must be at least 2"):
        QuestionConfig(phrase_words=1)
    with pytest.raises(DataError, match="spell: 100 examples need 100 words"):
        ask(Reader(), MANY[:60], QuestionConfig())
