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
from pipelines.shard.files import find_files
from pipelines.shard.reader import Document, Rejected, read_file

ROWS = [{"id": f"d{i}", "text": f"text {i} \N{SNOWMAN}", "other": [i]} for i in range(20)]
LINES = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)


def _read(file: Path, content: bytes | None = None, **settings: Any) -> list[Document | Rejected]:
    if content is not None:
        file.write_bytes(content)
    config = ShardConfig(input=(str(file),), **settings)
    (found,) = find_files(config.input)
    return list(read_file(found, config))


def _zstd(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.jsonl", LINES.rstrip(b"\n")),
        ("a.jsonl", b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n\r\n")),
        ("a.jsonl.gz", gzip.compress(LINES)),
        ("a.jsonl.gz", gzip.compress(LINES[:700]) + gzip.compress(LINES[700:])),
        ("a.jsonl.zst", _zstd(LINES)),
        ("a.jsonl.zst", _zstd(LINES[:700]) + _zstd(LINES[700:])),
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
        (b'{"text": "a", "id": 1.5}', "`$.id`"),
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
    assert after.doc_id == "a.jsonl:3"


@pytest.mark.parametrize(("name", "compress"), [("a.jsonl.gz", gzip.compress), ("a.jsonl.zst", _zstd)])
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
    assert [row.doc_id for row in rows if isinstance(row, Document)] == ["a.parquet:1", "a.parquet:5"]
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
    assert [(row.line, row.rows, row.reason) for row in refused] == [
        (601, 200, "damaged Parquet pages, 200 rows are lost")
    ]
    assert [row.offset for row in rows if isinstance(row, Document)] == [*range(600), *range(800, 1000)]
