"""What is evaluated: documents in an order of their own, cut into units of work that an actor reads by itself.

There are two kinds, a patch dataset (`PatchedDocuments`) and text files (`CorpusDocuments`). Both travel to actors and
tasks as they are, and hold no open file.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import msgspec

from blt.checkpoint import LanguageModelConfig
from pipelines.evaluate.rejects import UnitRows
from pipelines.manifest import SourceCounts, Split
from pipelines.shard.plan import Group
from pipelines.train.packing import RowGroup


class RowGroupUnit(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A row group of a patch dataset."""

    number: int
    """Place among all units."""
    path: str
    """Of the shard, relative to the root of the dataset."""
    row_group: int


class FilesUnit(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Files of a corpus, or ranges of them, all of one source."""

    group: Group

    @property
    def number(self) -> int:
        """Place among all units."""
        return self.group.index


EvaluateUnit = RowGroupUnit | FilesUnit


@dataclass(frozen=True, kw_only=True)
class DocumentBatch:
    """Some documents, a value for each."""

    doc_ids: Sequence[str]
    sources: Sequence[str]
    languages: Sequence[str | None]
    texts: Sequence[bytes]
    group: RowGroup | None
    """The documents with their patches; None: the model finds them."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some of the documents: all, those of a source, or those of a language (None: those that name none)."""

    kind: Literal["all", "source", "language"] = "all"
    name: str | None = None

    def holds(self, source: str, language: str | None) -> bool:
        """Whether such a document is one of them."""
        return self.kind == "all" or self.name == (source if self.kind == "source" else language)


@dataclass(frozen=True, kw_only=True)
class UnitCounts:
    """What was found in a unit."""

    unit: EvaluateUnit
    documents: int
    bytes: int
    patches: int
    rows: UnitRows | None
    """What became of its rows; None for a patch dataset, whose rows are all documents."""


class Documents(Protocol):
    """The documents of an evaluation; units and texts come in their order."""

    @property
    def split(self) -> Split | None:
        """Of a dataset."""

    @property
    def sources(self) -> Sequence[str]:
        """Names of all sources, in order."""

    @property
    def fingerprint(self) -> str:
        """Tells two inputs apart."""

    @property
    def input_bytes(self) -> int:
        """How much there is to read, in the measure of `unit_bytes`."""

    def check_model(self, model: LanguageModelConfig, directory: str) -> None:
        """ConfigError unless this model can be evaluated on them."""

    def units(self) -> Sequence[EvaluateUnit]:
        """Units of work, numbered from 0."""

    def unit_bytes(self, counts: UnitCounts) -> int:
        """How much of `input_bytes` a unit was."""

    def describe(self, unit: EvaluateUnit) -> str:
        """Which unit it is, for an error."""

    def read(self, unit: EvaluateUnit) -> Iterator[DocumentBatch | UnitRows]:
        """The documents of a unit, in bounded memory, and where rows may be none, what became of them at the end.

        DataError for what is broken.
        """

    def texts(self, part: Part) -> Iterator[bytes]:
        """The text of each document of a part."""

    def begin(self) -> None:
        """Called once before the first unit is read."""

    def finish(self, counts: Sequence[UnitCounts]) -> Mapping[str, SourceCounts]:
        """What became of the rows of each source, where rows may be no documents; `counts` of all units, in order.

        DataError unless the units hold what they should, and something at all.
        """
