"""Small document datasets: edge cases, and text of any length from a seed."""

import hashlib
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa

from pipelines.manifest import Manifest, ShardEntry, SourceCounts, write_manifest
from pipelines.schema import DOCUMENT_SCHEMA, encode_parquet, row_group_slices
from pipelines.storage import Storage

EDGE_DOCUMENTS = [
    b"",
    b"a",
    b"\n",
    "Ünïcödé 日本語 हिन्दी 🙂\n".encode(),
    bytes(range(256)) * 3,
    b"\xff\xfe\x00broken utf-8 \xc3",
    b"no boundary" + b"x" * 700,
    b"a b c d e f g",
    b"\x00" * 40,
]


def prose(seed: int, num_bytes: int) -> bytes:
    """Words of random letters: as many bytes of text, the same for a seed."""
    letters = random.Random(seed)
    words = ("".join(letters.choices("etaoinshrdlu", k=letters.randint(1, 9))) for _ in range(num_bytes))
    return " ".join(words).encode()[:num_bytes]


def write_documents(root: Path, shards: Mapping[str, Sequence[bytes]]) -> str:
    """Write a dataset of documents, a shard for each path, in row groups of at most 1,000 bytes; returns its root."""
    storage = Storage(str(root))
    entries = [_write_shard(storage, path, texts) for path, texts in shards.items()]
    rows, num_bytes = sum(entry.documents for entry in entries), sum(entry.bytes for entry in entries)
    counts = {"test": SourceCounts(rows_in=rows, rows_out=rows, quarantined=0, filtered=0, bytes=num_bytes)}
    write_manifest(storage.root_uri, Manifest(kind="documents", shards=tuple(entries), counts=counts))
    return storage.root_uri


def _write_shard(storage: Storage, path: str, texts: Sequence[bytes]) -> ShardEntry:
    sizes = [len(text) for text in texts]
    columns = [[f"{path}:{row}" for row in range(len(texts))], ["test"] * len(texts), list(texts), sizes]
    table = pa.table(columns, schema=DOCUMENT_SCHEMA)
    groups = [table.slice(rows.start, rows.stop - rows.start) for rows in row_group_slices(sizes, 1000)]
    data = encode_parquet(groups, DOCUMENT_SCHEMA, {})
    assert storage.write_exclusive(path, data)
    return ShardEntry(
        path=path,
        split="valid" if path.startswith("valid") else "train",
        documents=len(texts),
        bytes=sum(sizes),
        sha256=hashlib.sha256(data).hexdigest(),
    )
