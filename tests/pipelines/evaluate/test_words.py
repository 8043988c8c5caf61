"""The words that character tasks are made of: the commonest of a corpus, in a fixed order, from any format it is in."""

import json
import logging
from pathlib import Path

import pytest

from blt.errors import DataError
from pipelines.evaluate.words import common_words, read_texts
from pipelines.shard.config import SourceConfig


def words(*texts: str, min_letters: int = 2, max_letters: int = 20, most: int = 100) -> tuple[str, ...]:
    return common_words(texts, min_letters=min_letters, max_letters=max_letters, most=most)


def test_the_commonest_come_first_and_equals_by_their_letters() -> None:
    assert words("the end", "the start of the end, or so") == ("the", "end", "of", "or", "so", "start")
    assert words("the end", "the start of the end, or so", most=3) == ("the", "end", "of")


def test_what_is_a_word() -> None:
    assert words("Über große Straßen; don't we're it\u2019s x2 2x a_b end. (ok) he-she") == (
        "end", "große", "he", "ok", "she",
    )  # fmt: skip
    assert words("нация народ Россия") == ("народ", "нация")
    assert words("one three sevens", min_letters=4, max_letters=5) == ("three",)
    assert words("aa mmm ab") == ("ab",)


def test_texts_of_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    lines = [json.dumps({"body": text}) for text in ("one", "two", "three")]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "no json"]) + "\n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("größer", encoding="utf-8")
    source = SourceConfig(name="words", input=(str(tmp_path),), text_key="body")
    assert list(read_texts(source, 1000)) == ["one", "two", "three", "größer"]
    assert "documents=4 bytes=19 rejected_rows=1" in caplog.text
    assert list(read_texts(source, 4)) == ["one", "two"], "the first documents that hold so many bytes"


def test_no_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("no json\n", encoding="utf-8")
    with pytest.raises(DataError, match="no document to take words from"):
        list(read_texts(SourceConfig(name="words", input=(str(tmp_path / "a.jsonl"),)), 1000))
