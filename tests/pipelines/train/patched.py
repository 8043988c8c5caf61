"""Patched documents for tests of the training data path: drawn by hypothesis, decoded naively, written as shards."""

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from hypothesis import strategies as st

from blt.patching import PatchRule
from blt.vocabulary import BOS, BYTE_OFFSET, EOS
from pipelines.manifest import Manifest, Patching, ShardEntry, SourceCounts, Split, write_manifest
from pipelines.schema import ENTROPY_FIELD, PATCH_SCHEMA, pack_starts, patch_schema, row_group_slices
from pipelines.storage import Storage
from pipelines.train.packing import RowGroup
from tests.parquet_bytes import encode_parquet

MAX_PATCH = 6
RULE = PatchRule(kind="space", max_patch_length=MAX_PATCH)
PATCHING = Patching(entropy_model=None, rule=RULE, reset_on_newline=False, dtype="float32", device="cpu")


@dataclass(frozen=True)
class Patched:
    """A document and its n + 1 patch starts."""

    text: bytes
    starts: tuple[bool, ...]

    @property
    def ids(self) -> list[int]:
        return [BOS, *(byte + BYTE_OFFSET for byte in self.text), EOS]

    @property
    def num_patches(self) -> int:
        return sum(self.starts[:-1])


def patched(text: bytes, bits: Sequence[bool], max_patch: int = MAX_PATCH) -> Patched:
    """The document with a start where `bits` (any length, repeated) say so, and where a patch would grow too long."""
    starts: list[bool] = []
    length = 0
    for place in range(len(text) + 1):
        opens = place == 0 or length == max_patch or bool(bits and bits[place % len(bits)])
        length = 1 if opens else length + 1
        starts.append(opens)
    return Patched(text, tuple(starts))


def random_document(seed: int, num_bytes: int) -> Patched:
    """Random bytes and starts, the same for a seed."""
    source = random.Random(seed)
    return patched(source.randbytes(num_bytes), [source.random() < 0.3 for _ in range(num_bytes + 1)])


def patched_documents(max_documents: int = 6, max_bytes: int = 40) -> st.SearchStrategy[list[Patched]]:
    """Lists of documents, empty ones and empty lists among them."""
    document = st.builds(patched, st.binary(max_size=max_bytes), st.lists(st.booleans(), max_size=max_bytes + 1))
    return st.lists(document, max_size=max_documents)


def naive_row_group(documents: Sequence[Patched]) -> RowGroup:
    """What a row group decodes to, a document at a time."""
    text, bits, borders, bit_borders = b"", b"", [0], [0]
    for document in documents:
        text += document.text
        bits += pack_starts(np.asarray(document.starts))
        borders.append(borders[-1] + len(document.ids))
        bit_borders.append(len(bits))
    return RowGroup(
        text=np.frombuffer(text, np.uint8),
        borders=borders,
        bits=np.frombuffer(bits, np.uint8),
        bit_borders=bit_borders,
    )


def patch_table(documents: Sequence[Patched], source: str = "test") -> pa.Table:
    """The documents as rows of a patch dataset."""
    return pa.table(
        [
            [str(number) for number in range(len(documents))],
            [source] * len(documents),
            [document.text for document in documents],
            [len(document.text) for document in documents],
            [pack_starts(np.asarray(document.starts)) for document in documents],
            [document.num_patches for document in documents],
        ],
        schema=PATCH_SCHEMA,
    )


def stored_entropies(document: Patched) -> bytes:
    """n + 1 values as a dataset stores them: some of every byte value that can occur, the same for a document."""
    return bytes((7 * place + len(document.text)) % 178 for place in range(len(document.text) + 1))


def write_patches(
    root: Path | str,
    shards: Mapping[str, Sequence[Patched]],
    *,
    row_group_bytes: int = 100,
    patching: Patching = PATCHING,
    sources: Mapping[str, str] | None = None,
    with_entropies: bool = False,
) -> str:
    """A patch dataset, a shard for each path (`sources`: path -> source); returns its root. Entropies, where they are
    wanted, are those of `stored_entropies`.
    """
    storage, entries, counts = Storage(str(root)), [], dict[str, SourceCounts]()
    for path, documents in shards.items():
        source = (sources or {}).get(path, "test")
        table = patch_table(documents, source)
        if with_entropies:
            table = table.append_column(ENTROPY_FIELD, pa.array(map(stored_entropies, documents), pa.binary()))
        slices = row_group_slices([len(document.text) for document in documents], row_group_bytes)
        tables = [table.slice(rows.start, rows.stop - rows.start) for rows in slices]
        data = encode_parquet(tables, patch_schema(with_entropies), {})
        assert storage.write_exclusive(path, data)
        split: Split = "valid" if path.startswith("valid") else "train"
        rows, num_bytes = len(documents), sum(len(document.text) for document in documents)
        patches = sum(document.num_patches for document in documents)
        sha256 = hashlib.sha256(data).hexdigest()
        entry = ShardEntry(
            path=path, split=split, source=source, documents=rows, bytes=num_bytes, patches=patches, sha256=sha256
        )
        entries.append(entry)
        here = SourceCounts(rows_in=rows, rows_out=rows, quarantined=0, filtered=0, bytes=num_bytes)
        counts[source] = counts[source] + here if source in counts else here
    manifest = Manifest(
        kind="patches", shards=tuple(entries), counts=counts, patching=patching, entropies=with_entropies
    )
    write_manifest(storage.root_uri, manifest)
    return storage.root_uri
