"""Scores: what each document came out at, a row of figures for the document as it is and for each noised form of it.

An actor gives a table for each unit; the driver puts them one after the other in the order of the units, so that sums
over them do not depend on who computed what, nor when.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.evaluate.documents import Part

CLEAN = "clean"
"""The form that is not noised."""

SCHEMA = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),
        pa.field("language", pa.string()),
        pa.field("form", pa.string(), nullable=False),
        pa.field("is_text", pa.bool_(), nullable=False),
        pa.field("bytes", pa.int64(), nullable=False),
        pa.field("patches", pa.int64(), nullable=False),
        pa.field("one_byte_patches", pa.int64(), nullable=False),
        pa.field("hits", pa.int64(), nullable=False),
        pa.field("nats", pa.float64(), nullable=False),
        pa.field("entropy_model_nats", pa.float64(), nullable=False),
    ]
)
"""is_text: whether the document is valid UTF-8. hits: bytes that were the most likely next id. nats: of bytes and EOS;
entropy_model_nats is NaN where there is no entropy model."""

_LABELS = ("source", "language", "form")


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Rows of SCHEMA, column by column."""

    columns: Mapping[str, npt.NDArray[Any]]
    """Of source, language and form the place in `labels`, -1 for null."""
    labels: Mapping[str, Sequence[str]]

    def where(self, chosen: npt.NDArray[np.bool_]) -> "Scores":
        """Some of the rows."""
        return Scores(columns={name: values[chosen] for name, values in self.columns.items()}, labels=self.labels)

    def of(self, form: str) -> "Scores":
        """The rows of one form of the documents."""
        return self.where(self._is("form", form))

    def part(self, part: Part) -> "Scores":
        """The rows of some documents."""
        return self if part.kind == "all" else self.where(self._is(part.kind, part.name))

    @property
    def languages(self) -> list[str | None]:
        """Those that documents name, sorted, and None at the end if some name none."""
        found = set(self.columns["language"].tolist())
        names = sorted(self.labels["language"][code] for code in found if code >= 0)
        return [*names, *([None] if -1 in found else [])]

    @property
    def documents(self) -> int:
        return len(self.columns["bytes"])

    @property
    def entropy_model_nats(self) -> float | None:
        """Their sum; None where there is no entropy model."""
        values = self.columns["entropy_model_nats"]
        return None if np.isnan(values).any() or not len(values) else float(values.sum())

    def sum(self, name: str) -> int:
        """Of a column of counts."""
        return int(self.columns[name].sum())

    def _is(self, name: str, label: str | None) -> npt.NDArray[np.bool_]:
        labels = self.labels[name]
        code = -1 if label is None else labels.index(label) if label in labels else -2
        found: npt.NDArray[np.bool_] = self.columns[name] == code
        return found


def encode_scores(tables: Sequence[pa.Table]) -> bytes:
    """The tables one after the other, as Arrow's stream format."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, SCHEMA) as writer:
        for table in tables:
            writer.write_table(table)
    return bytes(sink.getvalue())


def decode_scores(data: bytes) -> pa.Table:
    return pa.ipc.open_stream(data).read_all()


def scores_of(tables: Sequence[pa.Table]) -> Scores:
    """All rows, in the order of the tables."""
    table = pa.concat_tables([SCHEMA.empty_table(), *tables])
    encoded = {name: table[name].dictionary_encode().combine_chunks() for name in _LABELS}
    codes = {name: column.indices.fill_null(-1).to_numpy() for name, column in encoded.items()}
    figures = {name: table[name].to_numpy() for name in SCHEMA.names if name not in _LABELS}
    labels = {name: column.dictionary.to_pylist() for name, column in encoded.items()}
    return Scores(columns=codes | figures, labels=labels)
