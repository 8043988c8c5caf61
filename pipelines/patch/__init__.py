"""Patching: document shards and an entropy model in, a dataset of documents with their patch starts out."""

from pipelines.patch.calibrate import CalibrateConfig, calibrate
from pipelines.patch.calibration import (
    Calibration,
    CalibrationRow,
    SourceCalibration,
    read_calibration,
    write_calibration,
)
from pipelines.patch.dataset import patch_dataset
from pipelines.patch.plan import PatchConfig

__all__ = [
    "CalibrateConfig",
    "Calibration",
    "CalibrationRow",
    "PatchConfig",
    "SourceCalibration",
    "calibrate",
    "patch_dataset",
    "read_calibration",
    "write_calibration",
]
