"""The documents that a measurement runs on: a seeded sample of a document dataset, or seeded words; as a dataset."""

import itertools
import random
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import pyarrow as pa

from blt.errors import DataError
from pipelines.manifest import Manifest, ShardEntry, SourceCounts, Split, read_manifest, write_manifest
from pipelines.schema import DOCUMENT_SCHEMA, ROW_GROUP_BYTES, row_group_slices, write_parquet
from pipelines.shard_file import open_shard
from pipelines.storage import Storage

SOURCE = "bench"
_PIECES = 64
"""Row groups that a sample is spread over where there are as many: it then holds something of each source."""


def sample_texts(documents: str, num_bytes: int, longest_bytes: int, seed: int) -> list[bytes]:
    """Whole documents of the dataset `documents`, `num_bytes` or a little more, a piece of each row group in turn.

    Those over `longest_bytes` are passed over. DataError if the dataset has less.
    """
    storage = Storage(documents)
    places = _row_groups(storage, [shard.path for shard in read_manifest(documents).shards])
    random.Random(seed).shuffle(places)
    turns = deque((path, number, 0) for path, number in places)
    piece_bytes = num_bytes // min(_PIECES, max(1, len(places))) + 1
    chosen: list[bytes] = []
    missing = num_bytes
    while missing > 0:
        if not turns:
            raise DataError(f"{documents} has {missing} bytes less than bytes={num_bytes} in documents that are fit")
        path, number, done = turns.popleft()
        with open_shard(storage, path, DOCUMENT_SCHEMA) as shard:
            table = shard.read(number, ["text"])
        fit = [text for text in table["text"].to_pylist() if len(text) <= longest_bytes][done:]
        piece = _take(iter(fit), min(piece_bytes, missing))
        chosen += piece
        missing -= sum(map(len, piece))
        if len(piece) < len(fit):
            turns.append((path, number, done + len(piece)))
    return chosen


def _row_groups(storage: Storage, paths: Sequence[str]) -> list[tuple[str, int]]:
    """Path and number of each row group of the shards."""
    places = []
    for path in paths:
        with open_shard(storage, path, DOCUMENT_SCHEMA) as shard:
            places += [(path, number) for number in range(shard.num_row_groups)]
    return places


def prose(seed: int, num_documents: int, document_bytes: int) -> list[bytes]:
    """Documents of words drawn from a small vocabulary, the frequent ones first; the same for a seed."""
    source = random.Random(seed)
    letters = "etaoinshrdlucmfwypvbgk"
    words = ["".join(source.choices(letters, range(len(letters), 0, -1), k=source.randint(1, 9))) for _ in range(2000)]
    weights = list(itertools.accumulate(1 / (rank + 1) for rank in range(len(words))))

    def document() -> bytes:  # a word takes two bytes or more
        return " ".join(source.choices(words, cum_weights=weights, k=document_bytes // 2 + 1)).encode()[:document_bytes]

    return [document() for _ in range(num_documents)]


def write_corpus(
    root: str,
    texts: Iterable[bytes],
    num_bytes: int,
    num_shards: int,
    valid: Sequence[bytes] = (),
    sources: Sequence[str] = (SOURCE,),
) -> None:
    """A document dataset of `num_shards` shards of about num_bytes / num_shards of text each, the sources in turn;
    consumes `texts` as it writes, and no more of them than that. `valid`: documents of a held-out shard of the first
    source, where there is to be one.
    """
    storage, texts = Storage(root), iter(texts)
    entries: list[ShardEntry] = []
    for number in range(num_shards):
        written = sum(entry.bytes for entry in entries)
        wanted = num_bytes * (number + 1) // num_shards - written
        source = sources[number % len(sources)]
        entries.append(_write_shard(storage, "train", number, source, _take(texts, wanted)))
    if valid:
        entries.append(_write_shard(storage, "valid", 0, sources[0], valid))
    counts = {source: _counts([entry for entry in entries if entry.source == source]) for source in sources}
    write_manifest(root, Manifest(kind="documents", shards=tuple(entries), counts=counts))


def repeated(texts: Sequence[bytes]) -> Iterator[bytes]:
    """The texts over and over."""
    return itertools.cycle(texts)


def _take(texts: Iterator[bytes], num_bytes: int) -> list[bytes]:
    taken: list[bytes] = []
    held = 0
    while held < num_bytes and (text := next(texts, None)) is not None:
        taken.append(text)
        held += len(text)
    return taken


def _counts(shards: Sequence[ShardEntry]) -> SourceCounts:
    rows, held = sum(shard.documents for shard in shards), sum(shard.bytes for shard in shards)
    return SourceCounts(rows_in=rows, rows_out=rows, quarantined=0, filtered=0, bytes=held)


def _write_shard(storage: Storage, split: Split, number: int, source: str, texts: Sequence[bytes]) -> ShardEntry:
    path, sizes = f"{split}/shard-{number:05d}.parquet", [len(text) for text in texts]
    columns = [[f"{split}:{number}:{row}" for row in range(len(texts))], [source] * len(texts), list(texts), sizes]
    table = pa.table(columns, schema=DOCUMENT_SCHEMA)
    tables = (table.slice(rows.start, rows.stop - rows.start) for rows in row_group_slices(sizes, ROW_GROUP_BYTES))
    with storage.create(path) as new:
        write_parquet(new, tables, DOCUMENT_SCHEMA, {})
    return ShardEntry(path=path, split=split, source=source, documents=len(texts), bytes=sum(sizes), sha256=new.sha256)
