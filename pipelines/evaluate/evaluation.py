"""The record of an evaluation: bits per byte with their confidence interval, by source and language, beside the
baselines; under noise; and the UTF-8 validity of samples.
"""

from dataclasses import dataclass, field

import msgspec

from blt.errors import DataError
from pipelines.evaluate.samples import SampleFigures
from pipelines.manifest import SourceCounts, Split
from pipelines.storage import Storage

EVALUATION_PATH = "evaluation.json"


@dataclass(frozen=True, kw_only=True)
class ScoreFigures:
    """What a model makes of some documents. None where there is no byte to divide by."""

    documents: int
    bytes: int
    """Of documents, without BOS and EOS."""
    patches: int
    """Of bytes: those of BOS, and of an EOS that opens one, are not counted."""
    mean_patch_bytes: float
    """bytes / patches; 0 without patches."""
    nats: float
    """Of bytes and EOS."""
    bpb: float | None
    """nats / (ln 2 * bytes)."""
    bpb_low: float | None = None
    """Lower end of the 95 % confidence interval: bootstrap over documents."""
    bpb_high: float | None = None
    accuracy: float | None = None
    """Share of the bytes that were the most likely next id; EOS is not counted."""
    one_byte_share: float | None = None
    """Share of the patches that have one byte."""


@dataclass(frozen=True, kw_only=True)
class PartFigures(ScoreFigures):
    """What is told of all documents, and of those of a source or a language."""

    entropy_model_bpb: float | None
    """Of the entropy model that makes the patches, reading each document as one stream; None if there is none."""
    model_flops_per_byte: float | None = None
    """Forward pass of the BLT at this mean patch size, in windows as evaluated, context that is read again not counted
    (blt/flops.py)."""
    entropy_model_flops_per_byte: float | None = None
    """Forward pass of the entropy model; 0 for a rule that needs none, None where it is not at hand."""
    flops_per_byte: float | None = None
    """Both."""
    baselines: dict[str, float]
    """Bits per byte of the same documents as one stream, by name: gzip -9, xz -9, zstd -19, order-0."""


@dataclass(frozen=True, kw_only=True)
class SourceFigures(PartFigures):
    """A source's share."""

    source: str
    baselines: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LanguageFigures(PartFigures):
    """A language's share."""

    language: str | None
    """As the documents name it; None: those that name none."""


@dataclass(frozen=True, kw_only=True)
class NoiseFigures(ScoreFigures):
    """What a model makes of documents that are noised, patched as they are then; bits are per noised byte."""

    noise: str
    """Or "clean": the same documents as they are."""


@dataclass(frozen=True, kw_only=True)
class NotText:
    """Documents that are left out under noise, which is a matter of characters: those that are no valid UTF-8."""

    documents: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Evaluation(PartFigures):
    """A model on documents. Fields with a default came later: a record that was written before has none of them."""

    bpb: float
    bpb_low: float
    bpb_high: float
    seconds: float
    """Wall time, actor start, baselines, noises and samples included."""
    bytes_per_second: float
    """Document bytes over the seconds that the BLT computed on the documents as they are, for one actor."""
    per_source: tuple[SourceFigures, ...]
    """By name of the source."""
    per_language: tuple[LanguageFigures, ...] = ()
    """By name of the language; empty if no key of a language is given."""
    noise: tuple[NoiseFigures, ...] = ()
    """Clean first; empty if no noise is asked for."""
    not_text: NotText | None = None
    """None if no noise is asked for."""
    samples: SampleFigures | None = None
    """None if none are asked for, or no document begins as text."""
    rows: dict[str, SourceCounts] = field(default_factory=dict)
    """By source, what became of the rows of text that is given as input; empty for a patch dataset."""
    split: Split | None
    """Of a patch dataset; None for text that is given as input."""
    sequence_patches: int
    sequence_bytes: int
    model: str
    """Fingerprint of the BLT."""
    data: str
    """Fingerprint of the patch dataset's manifest, or of the input files."""


def write_evaluation(root: str, evaluation: Evaluation) -> None:
    """Write `root`/evaluation.json."""
    text = msgspec.json.format(msgspec.json.encode(evaluation), indent=1)
    Storage(root).write_replace(EVALUATION_PATH, text + b"\n")


def read_evaluation(root: str) -> Evaluation:
    """The evaluation in the directory `root`; DataError, naming the file, if it is missing or broken."""
    storage = Storage(root)
    try:
        return msgspec.json.decode(storage.read_bytes(EVALUATION_PATH), type=Evaluation)
    except FileNotFoundError as error:
        raise DataError(f"evaluation {storage.url(EVALUATION_PATH)} does not exist") from error
    except (ValueError, OSError) as error:
        raise DataError(f"evaluation {storage.url(EVALUATION_PATH)} cannot be read: {error}") from error
