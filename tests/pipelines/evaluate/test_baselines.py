"""Baselines: the sizes that the tools themselves give, however the text comes in pieces."""

import gzip
import lzma
import math
from pathlib import Path

import pytest

from pipelines.evaluate.baselines import StreamSizes, stream_sizes
from tests.pipelines.train.patched import random_document, write_patches


def sizes_of(*pieces: bytes) -> dict[str, float]:
    sizes = StreamSizes()
    for piece in pieces:
        sizes.add(piece)
    return sizes.finish()


def test_gzip_and_xz_are_those_of_the_whole_stream() -> None:
    text = Path(__file__).read_bytes() * 20
    found = sizes_of(text[:1000], b"", text[1000:1001], text[1001:])
    assert found["gzip -9"] == len(gzip.compress(text, 9))
    assert found["xz -9"] == len(lzma.compress(text, preset=9))
    assert list(found) == ["gzip -9", "xz -9", "order-0"]


def test_order_0_is_the_entropy_of_the_bytes() -> None:
    assert sizes_of(bytes(range(256)))["order-0"] == pytest.approx(256)
    assert sizes_of(b"aaaa")["order-0"] == 0
    assert sizes_of(b"a", b"bbb")["order-0"] == pytest.approx((math.log2(4) + 3 * math.log2(4 / 3)) / 8)


def test_all_shards_are_one_stream_without_special_ids(tmp_path: Path) -> None:
    shards = {f"valid/shard-0000{n}.parquet": [random_document(n, 70), random_document(n, 0)] * 3 for n in range(2)}
    root = write_patches(tmp_path, shards)
    text = b"".join(document.text for documents in shards.values() for document in documents)
    assert stream_sizes(root, list(shards)) == sizes_of(text)
