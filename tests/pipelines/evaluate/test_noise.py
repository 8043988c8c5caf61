"""The five noises: their definitions character by character, the same for the same seed and document."""

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.evaluate import noise as module
from pipelines.evaluate.noise import NOISES, Noise, disturb

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=300)
LONG = "The quick brown fox, Über alle Straßen! \N{SNOWMAN}\n" * 2000


def noised(text: str, noise: Noise, seed: int = 0, doc_id: str = "d") -> str:
    return disturb(text.encode(), noise, seed, doc_id).decode()


@given(TEXTS)
def test_upper_case_and_ant_speak_are_the_case_of_all(text: str) -> None:
    assert noised(text, "upper_case") == text.upper()
    assert noised(text, "ant_speak") == " ".join(text.upper())
    assert noised(text, "ant_speak")[::2] == text.upper()


@given(TEXTS, st.integers(0, 5))
def test_drop_leaves_characters_in_their_order(text: str, seed: int) -> None:
    left = iter(text)
    assert all(character in left for character in noised(text, "drop", seed))  # each is found behind the one before


@given(TEXTS, st.integers(0, 5))
def test_random_case_is_either_case_of_each_character(text: str, seed: int) -> None:
    rest = noised(text, "random_case", seed)
    endings = {rest}
    for character in text:
        endings = {
            ending[len(case) :]
            for ending in endings
            for case in (character.upper(), character.lower())
            if ending.startswith(case)
        }
    assert "" in endings


@given(st.lists(st.characters(exclude_categories=["Cs"]), max_size=100), st.integers(0, 5))
def test_repeat_has_each_character_one_to_five_times(characters: list[str], seed: int) -> None:
    text = "".join(key for key, _ in itertools.groupby(characters))  # no neighbours are alike
    runs = [(key, len(list(run))) for key, run in itertools.groupby(noised(text, "repeat", seed))]
    assert "".join(key for key, _ in runs) == text
    assert all(1 <= times <= 5 for _, times in runs)


@given(TEXTS, st.sampled_from(NOISES), st.integers(0, 3), st.text(max_size=5))
def test_they_are_functions_of_text_seed_and_document(text: str, noise: Noise, seed: int, doc_id: str) -> None:
    assert noised(text, noise, seed, doc_id) == noised(text, noise, seed, doc_id)
    assert disturb(b"", noise, seed, doc_id) == b""


@pytest.mark.parametrize("noise", ["drop", "random_case", "repeat"])
def test_seed_document_and_noise_each_make_other_draws(noise: Noise) -> None:
    found = {noised(LONG, noise, seed, doc_id) for seed in (0, 1) for doc_id in ("a", "b")}
    assert len(found) == 4


def test_shares_are_those_of_the_paper() -> None:
    """Within four standard deviations of a binomial draw of 84,000 characters: 0.4 % at most."""
    assert len(noised(LONG, "drop")) / len(LONG) == pytest.approx(0.9, abs=0.005)
    letters = noised("abcdefghij" * 8400, "random_case")
    assert sum(c.isupper() for c in letters) / len(letters) == pytest.approx(0.5, abs=0.01)
    runs = Counter(len(list(run)) for _, run in itertools.groupby(noised("ab" * 42_000, "repeat")))
    assert runs[1] / 84_000 == pytest.approx(0.8, abs=0.006)
    for times in (2, 3, 4, 5):
        assert runs[times] / 84_000 == pytest.approx(0.05, abs=0.004)
    assert sum(runs.values()) == 84_000


@pytest.mark.parametrize("noise", NOISES)
def test_pieces_are_disturbed_as_the_whole(noise: Noise, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = noised(LONG, noise)
    monkeypatch.setattr(module, "_PIECE_CHARACTERS", 1000)
    assert noised(LONG, noise) == whole


@pytest.mark.parametrize("noise", NOISES)
def test_bytes_that_are_no_text_are_refused(noise: Noise) -> None:
    with pytest.raises(UnicodeDecodeError):
        disturb(b"a\xff", noise, 0, "d")
