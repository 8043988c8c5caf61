"""A small language model in a directory, and documents that it can be evaluated on."""

import pytest

from tests.pipelines.evaluate.cases import PATCHING, RULE, SHARDS, SOURCES
from tests.pipelines.train.patched import write_patches
from tests.small_language_model import save_small_language_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_small_language_model(tmp_path_factory.mktemp("evaluate") / "model", RULE)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_patches(tmp_path_factory.mktemp("evaluate") / "data", SHARDS, patching=PATCHING, sources=SOURCES)
