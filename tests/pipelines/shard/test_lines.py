"""Lines of a stream: right offsets and numbers for any chunking, long lines skipped and counted."""

import dataclasses
import gzip
import io
import itertools
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blt.errors import DataError
from pipelines.shard import lines
from pipelines.shard.lines import SourceReader, decompressed, read_lines


@given(st.lists(st.binary(max_size=12)).map(b"\n".join), st.integers(1, 9), st.integers(0, 8))
def test_lines_are_those_of_split(content: bytes, chunk_bytes: int, cap_bytes: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "CHUNK_BYTES", chunk_bytes)
        found = list(read_lines(io.BytesIO(content), cap_bytes))
    expected = content.split(b"\n")
    expected = expected[:-1] if expected[-1] == b"" else expected
    assert [line.number for line in found] == list(range(1, len(expected) + 1))
    assert [line.size_bytes for line in found] == [len(line) for line in expected]
    assert [content[line.offset : line.offset + line.size_bytes] for line in found] == expected
    assert [line.data for line in found] == [line if len(line) <= cap_bytes else None for line in expected]


@given(
    st.lists(st.binary(max_size=9)).map(b"\n".join),
    st.sets(st.integers(1, 60), max_size=4),
    st.integers(1, 9),
    st.integers(0, 6),
)
def test_ranges_share_the_lines_of_the_whole(content: bytes, cuts: set[int], chunk_bytes: int, cap_bytes: int) -> None:
    borders: list[int | None] = [0, *sorted(cut for cut in cuts if cut < len(content)), None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "CHUNK_BYTES", chunk_bytes)
        whole = list(read_lines(io.BytesIO(content), cap_bytes))
        found, before = [], 0
        for start, end in itertools.pairwise(borders):
            assert start is not None
            stream = io.BytesIO(content)
            stream.seek(max(0, start - 1))
            part = list(read_lines(stream, cap_bytes, start, end))
            assert [line.number for line in part] == list(range(1, len(part) + 1))
            assert all(start <= line.offset and (end is None or line.offset < end) for line in part)
            found += [dataclasses.replace(line, number=before + line.number) for line in part]
            before += len(part)
    assert found == whole


def test_a_range_inside_of_a_line_reads_no_further_than_its_end() -> None:
    stream = io.BytesIO(b"x" * 64 * lines.CHUNK_BYTES)
    stream.seek(9)
    assert list(read_lines(stream, 100, 10, 20)) == []
    assert stream.tell() <= 9 + lines.CHUNK_BYTES


def test_byte_order_mark_is_dropped_from_the_first_line_only() -> None:
    found = list(read_lines(io.BytesIO(b"\xef\xbb\xbfa\n\xef\xbb\xbfb"), 100))
    assert [line.data for line in found] == [b"a", b"\xef\xbb\xbfb"]
    assert found[1].offset == 5


@pytest.mark.parametrize("codec", ["gzip", "zstd"])
def test_members_that_follow_each_other_are_all_read(codec: str) -> None:
    one, two = (pa.compress(text, codec=codec, asbytes=True) for text in (b"a\nb\n", b"c\n"))
    source = SourceReader(io.BytesIO(one + two), "x")
    assert [line.data for line in read_lines(decompressed(source, codec), 9)] == [b"a", b"b", b"c"]  # type: ignore[arg-type]


def test_memory_stays_bounded_while_a_line_is_skipped() -> None:
    class Endless(io.RawIOBase):
        """64 MiB of one line, made as it is read."""

        left = 64

        def read(self, size: int = -1, /) -> bytes:
            self.left -= 1
            return b"x" * size if self.left >= 0 else b""

    tracemalloc.start()
    (line,) = read_lines(Endless(), 2 * lines.CHUNK_BYTES)  # type: ignore[arg-type]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert line.data is None
    assert line.size_bytes == 64 * lines.CHUNK_BYTES
    assert peak < 6 * lines.CHUNK_BYTES


def test_a_failing_disk_is_not_taken_for_damaged_data(tmp_path: Path) -> None:
    class FailingFile(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell() > 100:
                raise OSError(5, "Input/output error")
            return super().read(size)

    file = FailingFile(gzip.compress(bytes(range(256)) * 4000, compresslevel=0))
    with pytest.raises(DataError, match=r"cannot read disk/file\.gz: Input/output error"):
        list(read_lines(decompressed(SourceReader(file, "disk/file.gz"), "gzip"), 9))
