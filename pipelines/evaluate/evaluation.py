"""The record of an evaluation: bits per byte with their confidence interval, by source, beside the baselines."""

from dataclasses import dataclass

import msgspec
import numpy as np

from blt.errors import DataError
from blt.loss import bits_per_byte
from pipelines.evaluate.scoring import Nats
from pipelines.manifest import Split
from pipelines.storage import Storage
from pipelines.train.packing import Integers

EVALUATION_PATH = "evaluation.json"


@dataclass(frozen=True, kw_only=True)
class SourceFigures:
    """A source's share."""

    source: str
    documents: int
    bytes: int
    patches: int
    mean_patch_bytes: float
    nats: float
    bpb: float | None
    """None for a source without bytes."""
    entropy_model_bpb: float | None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A model on a split of a dataset. bpb = summed nats of bytes and EOS / (ln 2 * document bytes)."""

    documents: int
    bytes: int
    """Of documents, without BOS and EOS."""
    patches: int
    mean_patch_bytes: float
    nats: float
    bpb: float
    bpb_low: float
    """Lower end of the 95 % confidence interval: bootstrap over documents."""
    bpb_high: float
    seconds: float
    """Wall time, actor start and baselines included."""
    bytes_per_second: float
    """Document bytes over the seconds that the BLT computed, for one actor."""
    baselines: dict[str, float]
    """Bits per byte of all documents as one stream, by name: gzip -9, xz -9, order-0."""
    entropy_model_bpb: float | None
    """Of the entropy model that made the patches, reading each document as one stream; None if there is none."""
    per_source: tuple[SourceFigures, ...]
    """By name of the source."""
    split: Split
    sequence_patches: int
    sequence_bytes: int
    model: str
    """Fingerprint of the BLT."""
    data: str
    """Fingerprint of the patch dataset's manifest."""


def bootstrap_interval(nats_D: Nats, bytes_D: Integers, resamples: int, seed: int) -> tuple[float, float]:
    """95 % confidence interval of bpb: percentiles over resamples of the documents, drawn with replacement.

    A resample of documents without a byte has no bpb and is left out.
    """
    random = np.random.default_rng(seed)
    found = []
    for _ in range(resamples):
        chosen = random.integers(0, len(nats_D), len(nats_D))
        if num_bytes := int(bytes_D[chosen].sum()):
            found.append(bits_per_byte(float(nats_D[chosen].sum()), num_bytes))
    low, high = np.percentile(found, (2.5, 97.5)).tolist()
    return low, high


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
