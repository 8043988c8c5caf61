"""Which files a corpus consists of."""

import logging
import os
from pathlib import Path
from typing import Any

import pytest

from blt.errors import ConfigError, DataError
from pipelines.shard.config import SourceConfig
from pipelines.shard.files import InputFile, distinct_names, find_files, open_file


def _write(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)


def _find(*inputs: Path | str, **settings: Any) -> tuple[InputFile, ...]:
    return find_files(SourceConfig(name="c", input=tuple(map(str, inputs)), **settings))


def test_directories_globs_and_files(tmp_path: Path) -> None:
    _write(
        tmp_path, "a.jsonl", "deep/b.txt", "deep/er/c.parquet", "d.JSONL.GZ", ".hidden.txt", "_commits/x.jsonl", "e.md"
    )
    names = lambda *inputs: [file.name for file in _find(*(tmp_path / i for i in inputs))]  # noqa: E731
    assert names("") == ["a.jsonl", "d.JSONL.GZ", "deep/b.txt", "deep/er/c.parquet"]
    assert names("*.jsonl") == ["a.jsonl"]
    assert names("**/*.txt") == ["deep/b.txt"]
    assert names("deep/*/*") == ["er/c.parquet"]
    assert names("deep", "a.jsonl") == ["a.jsonl", "b.txt", "er/c.parquet"]
    assert names("a.jsonl", "*.jsonl", "a.jsonl") == ["a.jsonl"]


def test_a_file_named_by_itself_may_have_wildcards_in_its_name(tmp_path: Path) -> None:
    _write(tmp_path, "a[1].txt", "a1.txt")
    assert [f.name for f in _find(tmp_path / "a[1].txt")] == ["a[1].txt"]


def test_files_of_one_name_get_their_directories(tmp_path: Path) -> None:
    _write(tmp_path, "x/p/f.txt", "x/q/f.txt", "g.txt")
    files = _find(*(tmp_path / i for i in ("x/p/f.txt", "x/q", "g.txt")))
    assert [f.name for f in files] == ["g.txt", "p/f.txt", "q/f.txt"]


def test_files_passed_over_are_counted_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _write(tmp_path, "a.txt", "b.md", "c.csv")
    with caplog.at_level(logging.WARNING):
        _find(tmp_path)
    assert "files_of_other_kinds_passed_over=2" in caplog.text


def test_sample_follows_both_ends_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    content = bytearray(os.urandom(300_000))

    def sample() -> str:
        file.write_bytes(content)
        return _find(file)[0].sample

    samples = {sample()}
    for changed in (0, 65_535, 300_000 - 65_536, -1):
        content[changed] ^= 1
        samples.add(sample())
    assert len(samples) == 5
    content[150_000] ^= 1  # documented: the middle of a file that keeps its size is not looked at
    assert sample() in samples


def test_a_format_that_is_named_takes_every_visible_file(tmp_path: Path) -> None:
    _write(tmp_path, "a.json.gz", "b.json.ZST", "c", ".d", "_e/f")
    found = [(f.name, f.format, f.compression) for f in _find(tmp_path, format="jsonl")]
    assert found == [("a.json.gz", "jsonl", "gzip"), ("b.json.ZST", "jsonl", "zstd"), ("c", "jsonl", None)]
    found = [(f.name, f.format, f.compression) for f in _find(tmp_path / "*", format="binary")]
    assert found == [(name, "binary", None) for name in ("a.json.gz", "b.json.ZST", "c")]


@pytest.mark.parametrize("suffix", ["txt", "txt.gz", "txt.zst", "jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
def test_the_ending_says_format_and_compression(tmp_path: Path, suffix: str) -> None:
    _write(tmp_path, f"a.b.{suffix}")
    (file,) = _find(tmp_path)
    assert file.format == suffix.partition(".")[0]
    assert file.compression == {"gz": "gzip", "zst": "zstd"}.get(suffix.partition(".")[2])
    assert file.size_bytes == len(f"a.b.{suffix}")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("nothing.jsonl", "does not exist"),
        ("*.jsonl", "holds no file"),
        ("empty", "holds no file"),
        ("table.csv", "must end in one of .jsonl"),
    ],
)
def test_an_input_that_yields_nothing_is_named(tmp_path: Path, entry: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    _write(tmp_path, "table.csv")
    entry = str(tmp_path / entry)
    with pytest.raises(DataError, match=message) as error:
        _find(entry)
    assert entry in str(error.value)


def test_a_name_that_is_not_text_is_refused(tmp_path: Path) -> None:
    with open(os.fsencode(tmp_path) + b"/\xff.txt", "wb"):
        pass
    with pytest.raises(DataError, match="rename it"):
        _find(tmp_path)


def test_an_unknown_protocol_is_refused() -> None:
    with pytest.raises(ConfigError, match="nosuchprotocol"):
        find_files(SourceConfig(name="s", input=("nosuchprotocol://x/y.jsonl",)))


def test_credentials_in_an_input_are_refused_unseen() -> None:
    with pytest.raises(ConfigError, match="credentials") as error:
        find_files(SourceConfig(name="s", input=("s3://AKIAPLANTED:planted-secret@bucket/x.jsonl",)))
    assert "planted" not in str(error.value).lower()


def test_keys_that_differ_in_empty_parts_get_names_of_their_own() -> None:
    names = distinct_names({"s3://b/a//x.jsonl": "x.jsonl", "s3://b/a/x.jsonl": "x.jsonl", "s3://b/y.jsonl": "y.jsonl"})
    assert names == {"s3://b/a//x.jsonl": "/x.jsonl", "s3://b/a/x.jsonl": "a/x.jsonl", "s3://b/y.jsonl": "y.jsonl"}


@pytest.mark.parametrize("name", ["a::b.txt", "wide\u3000space.txt", "no\u00a0break.txt"])
def test_unusual_names_are_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("text")
    (found,) = find_files(SourceConfig(name="s", input=(str(tmp_path),)))
    assert found.name == name
    with open_file(found.url) as file:
        assert file.read() == b"text"
