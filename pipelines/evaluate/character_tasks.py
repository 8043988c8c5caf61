"""Character tasks: words and a seed in, questions about their letters and the answers out. Pure.

In the style of CUTE (Edman, Schmid and Fraser 2024, arXiv 2409.15452), which asks whether a model knows the letters of
its words and can move them: to spell, to put together, to find, insert, delete, substitute and swap, letters and, for
comparison, whole words. The wording, the words and the answers are our own, so figures are not those of CUTE.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

from blt.errors import DataError

TaskName = Literal[
    "spell",
    "inverse_spell",
    "contains_char",
    "contains_word",
    "insert_char",
    "insert_word",
    "delete_char",
    "delete_word",
    "substitute_char",
    "substitute_word",
    "swap_char",
    "swap_word",
]
TASKS: tuple[TaskName, ...] = get_args(TaskName)

YES, NO = "yes", "no"


@dataclass(frozen=True, kw_only=True)
class Example:
    """A question and its only right answer."""

    question: str
    answer: str


Part = TypeVar("Part")


def inserted(parts: Sequence[Part], new: Part, after: Part) -> list[Part]:
    """The parts (letters of a word, words of a phrase) with `new` after every `after`."""
    return [kept for part in parts for kept in ((part, new) if part == after else (part,))]


def deleted(parts: Sequence[Part], gone: Part) -> list[Part]:
    """The parts without every `gone`."""
    return [part for part in parts if part != gone]


def substituted(parts: Sequence[Part], old: Part, new: Part) -> list[Part]:
    """The parts with `new` for every `old`."""
    return [new if part == old else part for part in parts]


def swapped(parts: Sequence[Part], one: Part, other: Part) -> list[Part]:
    """The parts with every `one` and every `other` in each other's place."""
    exchanged = {one: other, other: one}
    return [exchanged.get(part, part) for part in parts]


def spelled(word: str) -> str:
    """Its letters with spaces between them."""
    return " ".join(word)


def put_together(letters: str) -> str:
    """The word of spaced letters."""
    return "".join(letters.split(" "))


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What a question is about, and what may be asked of it."""

    text: str
    """A word, or a phrase of words with spaces."""
    parts: tuple[str, ...]
    """Its letters or its words."""
    other: str
    """A letter or word that is none of them."""
    joint: str
    """What stands between the parts: nothing, or a space."""
    kind: Literal["letter", "word"]


def examples(task: TaskName, words: Sequence[str], count: int, phrase_words: int, seed: str) -> list[Example]:
    """So many examples of a task, no two about the same word; of questions for yes or no half have each answer.

    A function of its arguments alone. DataError for too few words.
    """
    source = random.Random(f"{seed} {task}")
    per_phrase = phrase_words if task.endswith("_word") else 1
    needed = max(count * per_phrase, per_phrase + 1)
    if len(words) < needed:
        raise DataError(f"{task}: {count} examples need {needed} words, got {len(words)}")
    alphabet = frozenset(letter for word in words for letter in word)
    chosen = source.sample(list(words), count * per_phrase)
    subjects = [
        _subject(chosen[number * per_phrase : (number + 1) * per_phrase], words, alphabet, task, source)
        for number in range(count)
    ]
    answers = [number % 2 == 0 for number in range(count)]
    source.shuffle(answers)
    return [_MAKE[task](subject, answer, source) for subject, answer in zip(subjects, answers, strict=True)]


def prompt(shots: Sequence[Example], question: str) -> str:
    """The solved examples, then the question; the answer goes after a space and ends with the line."""
    solved = "".join(f"Question: {shot.question}\nAnswer: {shot.answer}\n\n" for shot in shots)
    return f"{solved}Question: {question}\nAnswer:"


def is_choice(task: TaskName) -> bool:
    """Whether the answer is yes or no."""
    return task.startswith("contains_")


def _subject(
    chosen: Sequence[str], words: Sequence[str], alphabet: frozenset[str], task: TaskName, source: random.Random
) -> Subject:
    """One word with its letters, or several as a phrase. The other part is as common as in the words at large."""
    if task.endswith("_word"):
        other = _drawn(lambda: source.choice(words), chosen)
        return Subject(text=" ".join(chosen), parts=tuple(chosen), other=other, joint=" ", kind="word")
    (word,) = chosen
    if alphabet <= set(word):
        raise DataError(f"{task}: the words hold no letter that is not in {word!r}")
    other = _drawn(lambda: source.choice(source.choice(words)), word)
    return Subject(text=word, parts=tuple(word), other=other, joint="", kind="letter")


def _drawn(draw: Callable[[], str], excluded: Sequence[str]) -> str:
    """A draw that is not excluded, which there must be."""
    while (found := draw()) in excluded:
        pass
    return found


def _spell(subject: Subject, answer: bool, source: random.Random) -> Example:
    return Example(question=f'Spell "{subject.text}" letter by letter.', answer=spelled(subject.text))


def _inverse_spell(subject: Subject, answer: bool, source: random.Random) -> Example:
    return Example(question=f'Which word is spelled "{spelled(subject.text)}"?', answer=subject.text)


def _contains(subject: Subject, answer: bool, source: random.Random) -> Example:
    asked = source.choice(subject.parts) if answer else subject.other
    question = f'Is the {subject.kind} "{asked}" in "{subject.text}"?'
    return Example(question=question, answer=YES if answer else NO)


def _insert(subject: Subject, answer: bool, source: random.Random) -> Example:
    after = source.choice(subject.parts)
    question = f'Put the {subject.kind} "{subject.other}" after every "{after}" in "{subject.text}".'
    return Example(question=question, answer=subject.joint.join(inserted(subject.parts, subject.other, after)))


def _delete(subject: Subject, answer: bool, source: random.Random) -> Example:
    gone = source.choice(subject.parts)
    question = f'Take every {subject.kind} "{gone}" out of "{subject.text}".'
    return Example(question=question, answer=subject.joint.join(deleted(subject.parts, gone)))


def _substitute(subject: Subject, answer: bool, source: random.Random) -> Example:
    old = source.choice(subject.parts)
    question = f'Replace every {subject.kind} "{old}" by "{subject.other}" in "{subject.text}".'
    return Example(question=question, answer=subject.joint.join(substituted(subject.parts, old, subject.other)))


def _swap(subject: Subject, answer: bool, source: random.Random) -> Example:
    one, other = source.sample(sorted(set(subject.parts)), 2)
    question = f'Let every {subject.kind} "{one}" and every "{other}" change places in "{subject.text}".'
    return Example(question=question, answer=subject.joint.join(swapped(subject.parts, one, other)))


_MAKE: Mapping[TaskName, Callable[[Subject, bool, random.Random], Example]] = {
    "spell": _spell,
    "inverse_spell": _inverse_spell,
    "contains_char": _contains,
    "contains_word": _contains,
    "insert_char": _insert,
    "insert_word": _insert,
    "delete_char": _delete,
    "delete_word": _delete,
    "substitute_char": _substitute,
    "substitute_word": _substitute,
    "swap_char": _swap,
    "swap_word": _swap,
}
