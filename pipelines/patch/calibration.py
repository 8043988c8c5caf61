"""The record of a calibration: a threshold, what it was found for, and a table of the thresholds around it."""

from dataclasses import dataclass

import msgspec

from blt.errors import DataError
from blt.patching import PatchRule
from pipelines.storage import Storage

CALIBRATION_PATH = "calibration.json"


@dataclass(frozen=True, kw_only=True)
class CalibrationRow:
    """What one threshold gives on the sample."""

    threshold: float
    mean_patch_bytes: float
    p99_patch_bytes: int
    """99 % of the patches are at most this long."""
    one_byte_share: float
    """Share of the patches that are one byte long, 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class SourceCalibration:
    """What the thresholds of the table give on the documents of one source."""

    source: str
    sample_documents: int
    sample_bytes: int
    table: tuple[CalibrationRow, ...]
    """Rows of the same thresholds as the whole sample's, in the same order."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A threshold for a mean patch size, valid for one entropy model, rule and newline reset."""

    threshold: float
    """Nats; with a monotonic rule, nats of rise."""
    mean_patch_bytes: float
    """Of the sample at this threshold: what was reached."""
    target_mean_patch_bytes: float
    rule: PatchRule
    """With the threshold in it."""
    reset_on_newline: bool
    entropy_model: str
    """Fingerprint of the entropy model."""
    documents: str
    """Fingerprint of the document manifest."""
    sample_documents: int
    sample_bytes: int
    seed: int
    dtype: str
    device: str
    table: tuple[CalibrationRow, ...]
    """Ascending thresholds, the chosen one among them."""
    sources: tuple[SourceCalibration, ...] = ()
    """By name; empty in a record that is older than this field."""


def write_calibration(root: str, calibration: Calibration) -> None:
    """Write `root`/calibration.json."""
    text = msgspec.json.format(msgspec.json.encode(calibration), indent=1)
    Storage(root).write_replace(CALIBRATION_PATH, text + b"\n")


def read_calibration(path: str) -> Calibration:
    """The calibration in the file `path`, or in the directory `path`; DataError, naming it, if missing or broken."""
    root, name = (
        (path.rpartition("/")[0] or ".", path.rpartition("/")[2])
        if path.endswith(".json")
        else (path, CALIBRATION_PATH)
    )
    storage = Storage(root)
    try:
        return msgspec.json.decode(storage.read_bytes(name), type=Calibration)
    except FileNotFoundError as error:
        raise DataError(f"calibration {storage.url(name)} does not exist") from error
    except (ValueError, OSError) as error:
        raise DataError(f"calibration {storage.url(name)} cannot be read: {error}") from error
