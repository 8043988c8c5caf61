"""The sources that a model was trained on, as its directory tells of them: a manifest in, a line of JSON out.

A model outlives the dataset and the run that made it, so what its card says of them goes with it.
"""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

import msgspec

from blt.errors import DataError
from pipelines.manifest import Manifest


@dataclass(frozen=True, kw_only=True)
class ToldSource:
    """A source of the training split."""

    name: str
    documents: int
    bytes: int
    """Of text, once over."""
    license: str | None
    """Of its text, in words; None where none was given."""


def training_sources(manifest: Manifest, chosen: Collection[str] | None) -> list[ToldSource]:
    """The sources of the training split by name; of those `chosen`, unless that is None."""
    documents, num_bytes = Counter[str](), Counter[str]()
    for shard in manifest.split("train"):
        if shard.documents and (chosen is None or shard.source in chosen):
            documents[shard.source] += shard.documents
            num_bytes[shard.source] += shard.bytes
    return [
        ToldSource(name=name, documents=documents[name], bytes=num_bytes[name], license=manifest.licenses.get(name))
        for name in sorted(documents)
    ]


def write_sources(sources: Collection[ToldSource]) -> str:
    """One line of JSON."""
    return msgspec.json.encode(list(sources)).decode()


def read_sources(text: str) -> list[ToldSource]:
    """What `write_sources` wrote; DataError for anything else."""
    try:
        return msgspec.json.decode(text, type=list[ToldSource])
    except ValueError as error:
        raise DataError(f"what a model tells of its sources cannot be read: {error}") from error
