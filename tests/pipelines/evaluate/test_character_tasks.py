"""Character tasks: edits undo each other, a reader of the question alone finds the answer, and a seed says it all."""

import re
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blt.errors import DataError
from pipelines.evaluate.character_tasks import (
    TASKS,
    TaskName,
    deleted,
    examples,
    inserted,
    is_choice,
    prompt,
    put_together,
    spelled,
    substituted,
    swapped,
)

WORDS = ("people", "world", "years", "that", "Straße".lower(), "über", "нация", "every", "letter", "banana", "ssssa")
MANY = tuple(f"{first}{second}{third}" for first in "abcdef" for second in "éghij" for third in "klmnñ")

parts = st.lists(st.sampled_from("abcé"), max_size=12)


@given(st.text(alphabet=st.characters(exclude_characters=" "), max_size=20))
def test_spelling_is_undone_by_putting_together(word: str) -> None:
    assert put_together(spelled(word)) == word
    assert spelled(word)[::2] == word


@given(parts, st.sampled_from("abcé"))
def test_deletion_undoes_insertion(before: list[str], after: str) -> None:
    found = inserted(before, "x", after)
    assert deleted(found, "x") == before
    assert len(found) == len(before) + before.count(after)
    assert all(found[place - 1] == after for place, part in enumerate(found) if part == "x")


@given(parts, st.sampled_from("abcé"))
def test_deletion_leaves_the_others_in_order(before: list[str], gone: str) -> None:
    assert "".join(deleted(before, gone)) == "".join(before).replace(gone, "")


@given(parts, st.sampled_from("abcé"))
def test_substitution_is_undone_by_another(before: list[str], old: str) -> None:
    assert "".join(substituted(before, old, "x")) == "".join(before).replace(old, "x")
    assert substituted(substituted(before, old, "x"), "x", old) == before


@given(parts, st.permutations("abcé"))
def test_a_swap_undoes_itself(before: list[str], letters: Sequence[str]) -> None:
    one, other = letters[:2]
    found = swapped(before, one, other)
    assert swapped(found, one, other) == before == swapped(swapped(before, other, one), one, other)
    assert "".join(found) == "".join(before).replace(one, "\0").replace(other, one).replace("\0", other)


def solve(question: str) -> str:
    """The answer to a question, from its text alone and by other means than the generator's."""
    named = re.findall(r'"([^"]*)"', question)
    text, space = named[-1], " " if " word" in question else ""
    if "letter by letter" in question:
        return re.sub("(?!^)(.)", r" \1", text)
    if "is spelled" in question:
        return text.replace(" ", "")
    padded = re.sub("(.)", r"|\1|", text) if not space else "".join(f"|{word}|" for word in text.split(" "))
    if question.startswith("Is "):
        return "yes" if f"|{named[0]}|" in padded else "no"
    if question.startswith("Put "):
        new, after = named[:2]
        padded = padded.replace(f"|{after}|", f"|{after}||{new}|")
    elif question.startswith("Take "):
        padded = padded.replace(f"|{named[0]}|", "")
    elif question.startswith("Replace "):
        padded = padded.replace(f"|{named[0]}|", f"|{named[1]}|")
    else:
        assert question.startswith("Let ")
        one, other = (f"|{name}|" for name in named[:2])
        padded = padded.replace(one, "#").replace(other, one).replace("#", other)
    return padded.replace("||", space).strip("|")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("seed", ["0", "1"])
def test_answers_follow_from_the_questions(task: TaskName, seed: str) -> None:
    words = MANY if task.endswith("_word") else WORDS
    found = examples(task, words, 11, 3, seed)
    assert len(found) == 11
    assert [example.answer for example in found] == [solve(example.question) for example in found]
    assert all(example.answer for example in found)
    if is_choice(task):
        assert sum(example.answer == "yes" for example in found) == 6


@pytest.mark.parametrize("task", TASKS)
def test_a_seed_decides_the_questions(task: TaskName) -> None:
    found = examples(task, MANY, 20, 3, "7")
    assert examples(task, MANY, 20, 3, "7") == found
    assert examples(task, MANY, 20, 3, "8") != found
    assert len({example.question for example in found}) == 20


def test_questions_are_about_different_words() -> None:
    found = [re.findall(r'"([^"]*)"', example.question)[-1] for example in examples("swap_word", MANY, 30, 4, "0")]
    used = [word for phrase in found for word in phrase.split(" ")]
    assert len(used) == 120 == len(set(used))
    assert all(len(phrase.split(" ")) == 4 for phrase in found)


def test_prompts_end_where_the_answer_begins() -> None:
    shots = examples("spell", ("to", "be"), 1, 5, "0")
    text = prompt(shots, "Why?")
    assert text == f"Question: {shots[0].question}\nAnswer: {shots[0].answer}\n\nQuestion: Why?\nAnswer:"
    assert prompt([], "Why?") == "Question: Why?\nAnswer:"


@pytest.mark.parametrize(
    ("task", "words", "message"),
    [
        ("spell", WORDS[:3], "11 examples need 11 words, got 3"),
        ("delete_word", MANY[:30], "11 examples need 33 words, got 30"),
        ("insert_char", ("ab", "ba", "aba", *(f"{'ab' * n}" for n in range(2, 12))), "no letter that is not in"),
    ],
)
def test_too_few_words_are_refused(task: TaskName, words: Sequence[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        examples(task, words, 11, 3, "0")
