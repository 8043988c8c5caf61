"""Text files as what is evaluated: files and ranges of them as units, read as `blt shard` reads them, not shuffled.

The order is that of source names, file names and places in the files. A row that `shard` would quarantine or filter out
is no document here either, and is counted.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from blt.checkpoint import LanguageModelConfig
from blt.errors import ConfigError, DataError
from pipelines.evaluate.documents import DocumentBatch, EvaluateUnit, FilesUnit, Part, UnitCounts
from pipelines.evaluate.patcher import check_can_patch
from pipelines.evaluate.rejects import Rejects, UnitRows, remove_rejects, write_quarantine
from pipelines.manifest import SourceCounts
from pipelines.patch.boundaries import BATCH_BYTES
from pipelines.shard.config import CorpusConfig
from pipelines.shard.files import InputFile, find_files, refuse_output_in_input
from pipelines.shard.plan import Group, Unit, inputs_fingerprint, make_units
from pipelines.shard.reader import Document, Rejected, UnitReader
from pipelines.storage import Storage

_UNITS_PER_CORPUS = 64
_LEAST_UNIT_BYTES, _MOST_UNIT_BYTES = 64 * 2**10, 8 * 2**20
_DOCUMENT_OVERHEAD_BYTES = 256
"""What a document takes in a batch beside its text, about: so that a million tiny ones are bounded too."""


@dataclass(frozen=True, kw_only=True)
class TextConfig(CorpusConfig):
    """The files of an evaluation."""

    language_key: str | None = None
    """JSON key or Parquet column of a document's language; null makes no table by language. None is ever guessed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for source in self.all_sources:
            if self.language_key in ("", source.text_key, source.id_key):
                raise ConfigError(f"language_key must be a key of its own, got {self.language_key!r}")


@dataclass(frozen=True, kw_only=True)
class CorpusDocuments:
    """See `Documents`."""

    config: TextConfig
    groups: tuple[Group, ...]
    fingerprint: str
    """Of the files."""
    output: str
    """Directory in which rejected rows are listed, as any machine sees it."""

    split = None

    @property
    def sources(self) -> Sequence[str]:
        return [source.name for source in self.config.all_sources]

    @property
    def input_bytes(self) -> int:
        """Size of the files as they are stored."""
        return sum(group.input_bytes for group in self.groups)

    def check_model(self, model: LanguageModelConfig, directory: str) -> None:
        check_can_patch(model, directory, 'key "input"')

    def units(self) -> Sequence[EvaluateUnit]:
        return [FilesUnit(group=group) for group in self.groups]

    def unit_bytes(self, counts: UnitCounts) -> int:
        return _group_of(counts.unit).input_bytes

    def describe(self, unit: EvaluateUnit) -> str:
        group = _group_of(unit)
        first = group.units[0]
        more = f" and {len(group.units) - 1} more" if len(group.units) > 1 else ""
        return f"{first.file.url}{f' from byte {first.start}' if first.start else ''}{more}"

    def read(self, unit: EvaluateUnit) -> Iterator[DocumentBatch | UnitRows]:
        """Batches of about BATCH_BYTES of text, or of one longer document."""
        group = _group_of(unit)
        rejects = Rejects(group, Storage(self.output))
        held: list[Document] = []
        held_bytes = 0
        for number, files, row in self._rows(group, rejects):
            if isinstance(row, Rejected):
                rejects.reject(number, files, row)
            elif not self.config.keeps(len(row.text)):
                rejects.filter_out()
            else:
                size_bytes = len(row.text) + _DOCUMENT_OVERHEAD_BYTES
                if held and held_bytes + size_bytes > BATCH_BYTES:
                    yield _batch(group.source, held)
                    held, held_bytes = [], 0
                held.append(row)
                held_bytes += size_bytes
        if held:
            yield _batch(group.source, held)
        yield rejects.finish()

    def texts(self, part: Part) -> Iterator[bytes]:
        for group in self.groups:
            if part.kind == "source" and part.name != group.source:
                continue
            for _, _, row in self._rows(group, None):
                if (
                    isinstance(row, Document)
                    and self.config.keeps(len(row.text))
                    and part.holds(group.source, row.label)
                ):
                    yield row.text

    def begin(self) -> None:
        """Forget what an earlier run, which did not finish, has rejected."""
        remove_rejects(Storage(self.output))

    def finish(self, counts: Sequence[UnitCounts]) -> Mapping[str, SourceCounts]:
        """Rows in, kept, quarantined and filtered out; quarantine.jsonl is written. DataError if no document has a
        byte."""
        rows = [part.rows for part in counts if part.rows is not None]
        write_quarantine(self.groups, rows, Storage(self.output))
        total = dict.fromkeys(self.sources, SourceCounts(rows_in=0, rows_out=0, quarantined=0, filtered=0, bytes=0))
        for group, part, row in zip(self.groups, counts, rows, strict=True):
            total[group.source] += SourceCounts(
                rows_in=part.documents + row.quarantined + row.filtered,
                rows_out=part.documents,
                quarantined=row.quarantined,
                filtered=row.filtered,
                bytes=part.bytes,
            )
        if not sum(source.bytes for source in total.values()):
            problem = next((row.first_problem for row in rows if row.first_problem), None)
            raise DataError(
                f"input {self.config.inputs} holds no bytes to score: "
                f"{sum(source.rows_in for source in total.values())} rows read, "
                f"{sum(row.quarantined for row in rows)} refused, {sum(row.filtered for row in rows)} filtered out"
                + (f"; first refused: {problem}" if problem else "")
            )
        return total

    def _rows(self, group: Group, rejects: Rejects | None) -> Iterator[tuple[int, Unit, Document | Rejected]]:
        source = self.config.source_named(group.source)
        for number, unit in enumerate(group.units):
            reader = UnitReader(unit, source, self.config.max_line_bytes, label_key=self.config.language_key)
            for row in reader:
                yield number, unit, row
            if rejects is not None:
                rejects.count_lines(number, reader.num_lines)


def open_corpus(config: TextConfig, output: str) -> CorpusDocuments:
    """Find and sample the files; DataError names an input that yields nothing, ConfigError one that `output` is in."""
    files = {source.name: find_files(source) for source in config.all_sources}
    root = Storage(output).root_uri
    entries = (entry for source in config.all_sources for entry in source.input)
    refuse_output_in_input(root, entries, chain.from_iterable(files.values()))
    groups = cut_into_units(files)
    return CorpusDocuments(config=config, groups=groups, fingerprint=inputs_fingerprint(files), output=root)


def cut_into_units(files: Mapping[str, Sequence[InputFile]]) -> tuple[Group, ...]:
    """Consecutive files, or ranges of large ones, of one source each: a 64th of the whole text, from 64 KiB to 8 MiB.

    A function of the files alone, and never of the number of actors, so that no actor sees other batches. A compressed
    or text file is never cut, whatever it holds.
    """
    total = sum(file.size_bytes * file.text_per_byte for members in files.values() for file in members)
    cap_bytes = int(min(max(total / _UNITS_PER_CORPUS, _LEAST_UNIT_BYTES), _MOST_UNIT_BYTES))
    found: list[tuple[str, list[Unit]]] = []
    rank = held_bytes = 0
    for source, members in files.items():
        opens = True
        for file in members:
            for unit in make_units(file, rank, cap_bytes):
                if opens or held_bytes + unit.text_bytes > cap_bytes:
                    found.append((source, []))
                    opens, held_bytes = False, 0
                found[-1][1].append(unit)
                held_bytes += unit.text_bytes
            rank += 1
    return tuple(Group(index=i, source=source, units=tuple(units)) for i, (source, units) in enumerate(found))


def _group_of(unit: EvaluateUnit) -> Group:
    assert isinstance(unit, FilesUnit)
    return unit.group


def _batch(source: str, documents: Sequence[Document]) -> DocumentBatch:
    return DocumentBatch(
        doc_ids=[document.doc_id for document in documents],
        sources=[source] * len(documents),
        languages=[document.label for document in documents],
        texts=[document.text for document in documents],
        group=None,
    )
