"""Every row of every format is a document or is refused with its place and reason; nothing is lost in silence."""

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.shard.config import ShardConfig
from pipelines.shard.plan import plan_corpus
from pipelines.shard.reader import Document, Rejected, UnitReader
from tests.pipelines.shard.corpora import zstd

ROWS = [{"id": f"d{i}", "text": f"text {i} \N{SNOWMAN}", "other": [i]} for i in range(20)]
LINES = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)


def _read(
    file: Path, content: bytes | None = None, label_key: str | None = None, **settings: Any
) -> list[Document | Rejected]:
    if content is not None:
        file.write_bytes(content)
    config = ShardConfig(input=(str(file),), **settings)
    units = [unit for group in plan_corpus(config).groups for unit in group.units]
    rows: list[Document | Rejected] = []
    for unit in sorted(units, key=lambda unit: unit.start):
        rows += UnitReader(unit, config.all_sources[0], config.max_line_bytes, label_key=label_key)
    return rows


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.jsonl", LINES.rstrip(b"\n")),
        ("a.jsonl", b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n\r\n")),
        ("a.jsonl.gz", gzip.compress(LINES)),
        ("a.jsonl.gz", gzip.compress(LINES[:700]) + gzip.compress(LINES[700:])),
        ("a.jsonl.zst", zstd(LINES)),
        ("a.jsonl.zst", zstd(LINES[:700]) + zstd(LINES[700:])),
    ],
)
def test_jsonl_in_every_dress_gives_the_same_documents(tmp_path: Path, name: str, content: bytes) -> None:
    rows = _read(tmp_path / name, content)
    assert [(row.doc_id, row.text.decode()) for row in rows if isinstance(row, Document)] == [
        (row["id"], row["text"]) for row in ROWS
    ]
    assert len(rows) == len(ROWS)


def test_offsets_point_at_the_line(tmp_path: Path) -> None:
    for row in _read(tmp_path / "a.jsonl.gz", gzip.compress(LINES)):
        assert isinstance(row, Document)
        assert json.loads(LINES[row.offset :].partition(b"\n")[0])["id"] == row.doc_id


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "cut off', "not valid JSON"),
        (b'{"text": "a"} {"text": "b"}', "not valid JSON"),
        (b"plain words", "not valid JSON"),
        (b"\x00\xff\xfe", "not valid"),
        (b'{"body": "x", "id": "1"}', "missing required field `text` (keys: body, id)"),
        (b'{"text": null}', "got `null`"),
        (b'{"text": 17}', "got `int`"),
        (b'{"text": ["a"]}', "got `array`"),
        (b'["text"]', "got `array`"),
        (b'{"text": "lone \\ud800 surrogate"}', "surrogate"),
        (b'{"text": "lone \\udc00 surrogate"}', "surrogate"),
        (b'{"text": "raw \xed\xa0\x80 surrogate"}', "not valid UTF-8"),
        (b'{"text": "latin-1 caf\xe9"}', "not valid UTF-8"),
        (b'{"text": "overlong \xc0\xaf"}', "not valid UTF-8"),
        (b'{"x": ' + b"[" * 100_000, "not valid JSON|nested too deeply"),
        (b'{"x": ' + b'{"x": ' * 100_000, "nested too deeply"),
        (b'{"text": "' + b"x" * 700_000 + b'"}', "longer than max_line_bytes=614400: 700012 bytes"),
    ],
)
def test_a_bad_line_is_refused_alone(tmp_path: Path, line: bytes, reason: str) -> None:
    good = b'{"text": "good"}'
    before, bad, after = _read(tmp_path / "a.jsonl", b"\n".join([good, line, good]), max_line_bytes=614_400)
    assert isinstance(before, Document)
    assert isinstance(after, Document)
    assert isinstance(bad, Rejected)
    assert (bad.line, bad.offset, bad.rows) == (2, len(good) + 1, 1)
    assert any(part in bad.reason for part in reason.split("|")), bad.reason
    assert len(bad.reason) < 300
    assert after.doc_id == f"a.jsonl:{len(good) + len(line) + 2}"


@pytest.mark.parametrize(("name", "compress"), [("a.jsonl.gz", gzip.compress), ("a.jsonl.zst", zstd)])
@pytest.mark.parametrize("damage", ["cut", "cut by one", "tail", "not compressed", "empty"])
def test_a_damaged_compressed_file_is_never_silent(tmp_path: Path, name: str, compress: Any, damage: str) -> None:
    texts = [hashlib.sha512(b"%d" % i).hexdigest() * 20 for i in range(2000)]  # several chunks of the stream
    whole = compress("".join(f'{{"text": "{text}"}}\n' for text in texts).encode())
    content = {
        "cut": whole[: len(whole) * 3 // 4],
        "cut by one": whole[:-1],
        "tail": whole + b"more",
        "not compressed": LINES,
        "empty": b"",
    }[damage]
    rows = _read(tmp_path / name, content)
    refused = [row for row in rows if isinstance(row, Rejected)]
    assert len(refused) == 1
    assert refused[0] is rows[-1]
    assert "stream" in refused[0].reason
    assert refused[0].line == len(rows)
    if damage in ("cut", "cut by one", "tail"):
        assert len(texts) // 4 < len(rows) <= len(texts) + 1
        assert [row.text.decode() for row in rows if isinstance(row, Document)] == texts[: len(rows) - 1]


def test_text_file_is_one_document_named_as_the_file(tmp_path: Path) -> None:
    assert _read(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\n\ntwo\n") == [
        Document("a.txt", b"\xef\xbb\xbfone\r\n\ntwo\n", 0)
    ]
    assert _read(tmp_path / "b.txt", b"") == [Document("b.txt", b"", 0)]
    (refused,) = _read(tmp_path / "c.txt", b"ok \xff")
    assert isinstance(refused, Rejected)
    assert refused.reason == "not valid UTF-8 (byte 3)"
    (refused,) = _read(tmp_path / "d.txt", b"x" * 11, max_line_bytes=10)
    assert isinstance(refused, Rejected)
    assert "longer than max_line_bytes=10" in refused.reason


@pytest.mark.parametrize(("suffix", "pack"), [("txt", bytes), ("txt.gz", gzip.compress), ("txt.zst", zstd)])
def test_text_file_in_every_dress_is_one_document(tmp_path: Path, suffix: str, pack: Any) -> None:
    text = b"Zeile\r\n" * 300_000  # more than a chunk
    assert _read(tmp_path / f"a.{suffix}", pack(text)) == [Document(f"a.{suffix}", text, 0)]
    (refused,) = _read(tmp_path / f"a.{suffix}", pack(text + b"\xff"))
    assert isinstance(refused, Rejected)
    assert refused.reason == f"not valid UTF-8 (byte {len(text)})"
    kept = Document(f"a.{suffix}", text + b"\xff", 0)
    assert _read(tmp_path / f"a.{suffix}", invalid_utf8="keep") == [kept]
    (refused,) = _read(tmp_path / f"a.{suffix}", max_line_bytes=100)
    assert isinstance(refused, Rejected)
    assert "longer than max_line_bytes=100" in refused.reason


@pytest.mark.parametrize(("suffix", "pack"), [("txt.gz", gzip.compress), ("txt.zst", zstd)])
@pytest.mark.parametrize("kept", [0, 1, 100, -1])
def test_a_cut_compressed_text_file_is_refused_whole(tmp_path: Path, suffix: str, pack: Any, kept: int) -> None:
    text = b"".join(hashlib.sha512(b"%d" % i).hexdigest().encode() for i in range(20_000))
    (refused,) = _read(tmp_path / f"a.{suffix}", pack(text)[:kept])
    assert isinstance(refused, Rejected)
    assert "stream" in refused.reason


def test_binary_files_are_documents_of_any_bytes(tmp_path: Path) -> None:
    content = bytes(range(256)) * 3
    assert _read(tmp_path / "a.png", content, format="binary") == [Document("a.png", content, 0)]
    assert _read(tmp_path / "b.gz", gzip.compress(content), format="binary")[0].text == (tmp_path / "b.gz").read_bytes()  # type: ignore[union-attr]


def test_a_format_that_is_named_overrides_the_ending(tmp_path: Path) -> None:
    rows = _read(tmp_path / "a.json.gz", gzip.compress(LINES), format="jsonl")
    assert [row.text.decode() for row in rows if isinstance(row, Document)] == [row["text"] for row in ROWS]


TEXTS = [row["text"] for row in ROWS]


@pytest.mark.parametrize(
    "column",
    [
        pa.array(TEXTS, pa.string()),
        pa.array(TEXTS, pa.large_string()),
        pa.array(TEXTS, pa.string_view()),
        pa.array(TEXTS, pa.string()).dictionary_encode(),
        pa.array([str(t).encode() for t in TEXTS], pa.binary()),
        pa.array([str(t).encode() for t in TEXTS], pa.large_binary()),
    ],
    ids=lambda column: str(column.type),
)
def test_parquet_of_every_text_type(tmp_path: Path, column: pa.Array) -> None:
    table = pa.table({"other": [0] * 20, "body": column, "key": [row["id"] for row in ROWS]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    rows = _read(tmp_path / "a.parquet", text_key="body", id_key="key")
    assert rows == [Document(str(row["id"]), str(row["text"]).encode(), i) for i, row in enumerate(ROWS)]


def test_parquet_rows_that_are_no_text_are_refused_alone(tmp_path: Path) -> None:
    table = pa.table({"text": pa.array([b"good", None, b"\xff", b"x" * 11, b"good"], pa.binary())})
    pq.write_table(table, tmp_path / "a.parquet")
    rows = _read(tmp_path / "a.parquet", max_line_bytes=10)
    assert [row.doc_id for row in rows if isinstance(row, Document)] == ["a.parquet:0", "a.parquet:4"]
    assert [(row.line, row.reason) for row in rows if isinstance(row, Rejected)] == [
        (2, "'text' is null, not text"),
        (3, "not valid UTF-8 (byte 0)"),
        (4, "longer than max_line_bytes=10: 11 bytes or more"),
    ]


def test_parquet_without_the_column_counts_all_its_rows(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["a", "b", "c"]}), tmp_path / "a.parquet")
    (refused,) = _read(tmp_path / "a.parquet")
    assert isinstance(refused, Rejected)
    assert (refused.rows, refused.reason) == (3, "no column 'text' (columns: body)")


def test_parquet_numbers_are_not_text(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
    assert [row.reason for row in _read(tmp_path / "a.parquet") if isinstance(row, Rejected)] == [
        "'text' is int, not text"
    ] * 2


@pytest.mark.parametrize("kept", [0, 3, 300, -1])
def test_damaged_parquet_is_never_silent(tmp_path: Path, kept: int) -> None:
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "a.parquet")
    rows = _read(tmp_path / "a.parquet", (tmp_path / "a.parquet").read_bytes()[:kept])
    assert [type(row) for row in rows] == [Rejected]
    assert "damaged Parquet file" in rows[0].reason  # type: ignore[union-attr]
    assert "\n" not in rows[0].reason  # type: ignore[union-attr]


def test_parquet_with_damaged_pages_loses_their_row_group_alone(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [str(i) * 50 for i in range(1000)]}), tmp_path / "a.parquet", row_group_size=200)
    whole = (tmp_path / "a.parquet").read_bytes()
    start = pq.read_metadata(tmp_path / "a.parquet").row_group(3).column(0).dictionary_page_offset
    rows = _read(tmp_path / "a.parquet", whole[:start] + b"\xff" * 200 + whole[start + 200 :])
    refused = [row for row in rows if isinstance(row, Rejected)]
    assert [(row.line, row.rows) for row in refused] == [(601, 200)]
    assert refused[0].reason.startswith("damaged Parquet pages, 200 rows are lost: ")
    assert [row.offset for row in rows if isinstance(row, Document)] == [*range(600), *range(800, 1000)]


def test_parquet_keeps_raw_bytes_on_request_and_ids_are_always_text(tmp_path: Path) -> None:
    texts = pa.array([b"a\xff", b"\xed\xa0\x80", b"ok"], pa.binary())
    ids = pa.array([b"\xff", b"b", None], pa.binary())
    pq.write_table(pa.table({"text": texts, "id": ids}), tmp_path / "a.parquet")
    assert _read(tmp_path / "a.parquet", invalid_utf8="keep") == [
        Document("\ufffd", b"a\xff", 0),
        Document("b", b"\xed\xa0\x80", 1),
        Document("a.parquet:2", b"ok", 2),
    ]
    assert [type(row) for row in _read(tmp_path / "a.parquet")] == [Rejected, Rejected, Document]


@pytest.mark.parametrize("group_bytes", [1, 100, 331, 5000])
def test_split_files_give_the_documents_of_the_whole(tmp_path: Path, group_bytes: int) -> None:
    rows = [{"text": f"text {i} " * (i % 7)} for i in range(60)]
    content = b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(row).encode() for row in rows[:30])
    content += b"\n\n\nbroken\n" + b"\n".join(json.dumps(row).encode() for row in rows[30:])
    whole = _read(tmp_path / "a.jsonl", content)
    split = _read(tmp_path / "a.jsonl", group_bytes=group_bytes)
    assert [row for row in split if isinstance(row, Document)] == [row for row in whole if isinstance(row, Document)]
    assert [row.offset for row in split if isinstance(row, Rejected)] == [content.index(b"broken")]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=7)
    assert _read(tmp_path / "a.parquet", group_bytes=group_bytes) == _read(tmp_path / "a.parquet")


@pytest.mark.parametrize("content", [None, b"no parquet" * 50])
def test_what_concerns_a_whole_parquet_file_is_told_once(tmp_path: Path, content: bytes | None) -> None:
    pq.write_table(pa.table({"body": ["a", "b", "c"]}), tmp_path / "a.parquet")
    (refused,) = _read(tmp_path / "a.parquet", content, group_bytes=10)
    assert isinstance(refused, Rejected)


def test_memory_that_runs_out_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **settings: Any) -> None:
        raise pa.ArrowMemoryError("malloc of size 9 failed")

    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", fail)
    with pytest.raises(MemoryError):
        _read(tmp_path / "a.parquet")


def test_parquet_with_two_columns_of_a_name_is_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a", "b"])] * 2, names=["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    (rejected,) = _read(tmp_path / "a.parquet")
    assert isinstance(rejected, Rejected)
    assert (rejected.rows, rejected.reason) == (2, "more than one column 'text'")


LABELS: list[str | None] = ["de", None, "3", "\ufffd"]


def test_labels_of_json_lines_are_text_or_nothing(tmp_path: Path) -> None:
    lines = [b'{"text": "a", "lang": "de"}', b'{"text": "b"}', b'{"text": "c", "lang": 3}']
    rows = _read(tmp_path / "a.jsonl", b"\n".join(lines), label_key="lang")
    assert [row.label for row in rows if isinstance(row, Document)] == LABELS[:3]
    lines.append(b'{"text": "d\xff", "lang": "\xff"}')
    rows = _read(tmp_path / "b.jsonl", b"\n".join(lines), label_key="lang", invalid_utf8="keep")
    assert [row.label for row in rows if isinstance(row, Document)] == LABELS
    rows = _read(tmp_path / "b.jsonl", label_key=None, invalid_utf8="keep")
    assert [row.label for row in rows if isinstance(row, Document)] == [None] * 4


@pytest.mark.parametrize("key", ["lang", "not there"])
def test_labels_of_parquet_rows_are_text_or_nothing(tmp_path: Path, key: str) -> None:
    columns = {"text": list("abcd"), "lang": pa.array([b"de", None, b"3", b"\xff"]), "id": list("wxyz")}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    rows = _read(tmp_path / "a.parquet", label_key=key)
    labels = LABELS if key == "lang" else [None] * 4
    assert [(row.doc_id, row.label) for row in rows if isinstance(row, Document)] == list(
        zip("wxyz", labels, strict=True)
    )
