"""Baselines: the sizes that the tools themselves give, however the text comes in pieces."""

import gzip
import lzma
import math
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.evaluate import open_patched
from pipelines.evaluate.baselines import StreamSizes, ZstdStream, stream_sizes
from pipelines.evaluate.documents import Part
from tests.pipelines.train.patched import random_document, write_patches


def sizes_of(*pieces: bytes) -> dict[str, float]:
    sizes = StreamSizes()
    for piece in pieces:
        sizes.add(piece)
    return sizes.finish()


def test_compressors_are_those_of_the_whole_stream() -> None:
    text = Path(__file__).read_bytes() * 20
    found = sizes_of(text[:1000], b"", text[1000:1001], text[1001:])
    assert found["gzip -9"] == len(gzip.compress(text, 9))
    assert found["xz -9"] == len(lzma.compress(text, preset=9))
    assert found["zstd -19"] == len(pa.Codec("zstd", compression_level=19).compress(text, asbytes=True))
    assert list(found) == ["gzip -9", "xz -9", "zstd -19", "order-0"]


def test_a_long_zstd_stream_is_cut_into_frames() -> None:
    text = Path(__file__).read_bytes() * 20
    stream, found = ZstdStream(frame_bytes=10_000), b""
    for start in range(0, len(text), 7000):
        found += stream.compress(text[start : start + 7000])
    found += stream.flush()
    assert pa.CompressedInputStream(pa.BufferReader(found), "zstd").read() == text
    sizes = [len(text[start : start + 10_000]) for start in range(0, len(text), 10_000)]
    codec = pa.Codec("zstd", compression_level=19)
    frames = [codec.compress(text[i * 10_000 : i * 10_000 + size], asbytes=True) for i, size in enumerate(sizes)]
    assert found == b"".join(frames)


def test_compressors_that_are_not_asked_for_are_left_out() -> None:
    sizes = StreamSizes(["zstd"])
    sizes.add(b"text")
    assert list(sizes.finish()) == ["zstd -19", "order-0"]


def test_order_0_is_the_entropy_of_the_bytes() -> None:
    assert sizes_of(bytes(range(256)))["order-0"] == pytest.approx(256)
    assert sizes_of(b"aaaa")["order-0"] == 0
    assert sizes_of(b"a", b"bbb")["order-0"] == pytest.approx((math.log2(4) + 3 * math.log2(4 / 3)) / 8)


def test_all_shards_are_one_stream_without_special_ids(tmp_path: Path) -> None:
    shards = {f"valid/shard-0000{n}.parquet": [random_document(n, 70), random_document(n, 0)] * 3 for n in range(2)}
    sources = dict(zip(shards, "ab", strict=True))
    documents = open_patched(write_patches(tmp_path, shards, sources=sources), "valid")
    texts = {sources[path]: b"".join(document.text for document in held) for path, held in shards.items()}
    everything = ("gzip", "xz", "zstd")
    assert stream_sizes(documents, Part(), everything) == sizes_of(texts["a"] + texts["b"])
    for name, text in texts.items():
        assert stream_sizes(documents, Part(kind="source", name=name), everything) == sizes_of(text)
