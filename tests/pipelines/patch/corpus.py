"""Small document datasets: edge cases, and text of any length from a seed."""

import dataclasses
import hashlib
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import pyarrow as pa

from pipelines.manifest import Manifest, ShardEntry, SourceCounts, write_manifest
from pipelines.schema import DOCUMENT_SCHEMA, row_group_slices
from pipelines.storage import Storage
from tests.parquet_bytes import encode_parquet

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


def write_documents(
    root: Path | str,
    shards: Mapping[str, Sequence[bytes]],
    sources: Mapping[str, str] = MappingProxyType({}),
    row_group_bytes: int = 1000,
) -> str:
    """Write a dataset of documents, a shard for each path; returns its root.

    `sources` names the source of a path; the others are of "test".
    """
    storage = Storage(str(root))
    entries = [
        _write_shard(storage, path, texts, sources.get(path, "test"), row_group_bytes) for path, texts in shards.items()
    ]
    empty = SourceCounts(rows_in=0, rows_out=0, quarantined=0, filtered=0, bytes=0)
    counts: dict[str, SourceCounts] = {}
    for entry in entries:
        rows = dataclasses.replace(empty, rows_in=entry.documents, rows_out=entry.documents, bytes=entry.bytes)
        counts[entry.source] = counts.get(entry.source, empty) + rows
    write_manifest(storage.root_uri, Manifest(kind="documents", shards=tuple(entries), counts=counts))
    return storage.root_uri


def _write_shard(storage: Storage, path: str, texts: Sequence[bytes], source: str, row_group_bytes: int) -> ShardEntry:
    sizes = [len(text) for text in texts]
    columns = [[f"{path}:{row}" for row in range(len(texts))], [source] * len(texts), list(texts), sizes]
    table = pa.table(columns, schema=DOCUMENT_SCHEMA)
    groups = [table.slice(rows.start, rows.stop - rows.start) for rows in row_group_slices(sizes, row_group_bytes)]
    data = encode_parquet(groups, DOCUMENT_SCHEMA, {})
    assert storage.write_exclusive(path, data)
    return ShardEntry(
        path=path,
        split="valid" if path.startswith("valid") else "train",
        source=source,
        documents=len(texts),
        bytes=sum(sizes),
        sha256=hashlib.sha256(data).hexdigest(),
    )
