"""What a model tells of the sources that it was trained on: written, read back, broken."""

import dataclasses
from pathlib import Path

import pytest

from blt.errors import DataError
from pipelines.manifest import read_manifest
from pipelines.train.told_sources import ToldSource, read_sources, training_sources, write_sources
from tests.pipelines.train.tiny_run import write_tiny_patches


def test_sources_of_the_training_split(tmp_path: Path) -> None:
    manifest = read_manifest(write_tiny_patches(tmp_path / "patches"))
    manifest = dataclasses.replace(manifest, licenses={"small": "public domain", "gone": "MIT"})
    large = ToldSource(name="large", documents=6, bytes=18_000, license=None)
    small = ToldSource(name="small", documents=2, bytes=800, license="public domain")
    assert training_sources(manifest, None) == [large, small]
    assert training_sources(manifest, {"small": 1.0}) == [small]
    assert read_sources(write_sources([large, small])) == [large, small]


def test_what_is_none_is_refused() -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_sources("speeches")
