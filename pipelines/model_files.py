"""Model directories on storage: their files in a local directory, which is where models are loaded from."""

import functools
import logging
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from blt.checkpoint import (
    Kind,
    LanguageModelConfig,
    entropy_model_fingerprint,
    language_model_config,
    model_kind,
)
from blt.errors import CheckpointError
from pipelines.filesystem import BLOCK_BYTES
from pipelines.storage import Storage

logger = logging.getLogger(__name__)

Content = TypeVar("Content")

MODEL_FILES = (
    "config.json",
    "model.safetensors",
    "entropy_model/config.json",
    "entropy_model/model.safetensors",
)
"""All that a model directory holds; the last two only beside a language model that comes with its entropy model."""

_downloading = threading.Lock()


def local_model(uri: str) -> str:
    """An absolute local directory with the files of the model directory `uri`.

    A local directory is given as it is. From S3 the files are fetched once per process, into a temporary directory
    that goes with it. CheckpointError, naming `uri`, if there is no model.
    """
    return _local(uri, _is_model_file)


def local_checkpoint(uri: str) -> str:
    """The same for a checkpoint in transformers' format: config.json, safetensors files and their index."""
    return _local(uri, _is_checkpoint_file)


def _local(uri: str, wanted: Callable[[str], bool]) -> str:
    storage = Storage(uri)
    if storage.is_local:
        return storage.root_uri
    with _downloading:  # two threads that ask at once must not fetch twice
        return str(Path(_downloads().name) / _download(storage.root_uri, wanted))


def _is_model_file(path: str) -> bool:
    return path in MODEL_FILES


def _is_checkpoint_file(path: str) -> bool:
    return "/" not in path and (path == "config.json" or path.endswith((".safetensors", ".safetensors.index.json")))


def store_model(directory: str | Path, uri: str) -> None:
    """Put the model in a local directory at `uri`, file by file; a reader finds config.json last."""
    storage = Storage(uri)
    for path in MODEL_FILES:
        storage.delete(path)
    for path in reversed(MODEL_FILES):
        source = Path(directory) / path
        if not source.exists():
            continue
        with source.open("rb") as file, storage.create(path) as new:
            while block := file.read(BLOCK_BYTES):
                new.write(block)


def model_fingerprint(uri: str) -> str:
    """Fingerprint of the entropy model in the directory `uri`, of which only config.json is read; CheckpointError."""
    return _of_config(uri, entropy_model_fingerprint)


def model_kind_of(uri: str) -> Kind:
    """What the model directory `uri` holds, of which only config.json is read; CheckpointError."""
    return _of_config(uri, model_kind)


def model_config(uri: str) -> LanguageModelConfig:
    """config.json of the language model in the directory `uri`, of which nothing else is read; CheckpointError."""
    return _of_config(uri, language_model_config)


def _of_config(uri: str, read: Callable[[str], Content]) -> Content:
    """What `read` makes of a directory that has the config.json of `uri`."""
    storage = Storage(uri)
    if storage.is_local:
        return read(storage.root_uri)
    with tempfile.TemporaryDirectory(prefix="blt-config-") as directory:
        try:
            (Path(directory) / MODEL_FILES[0]).write_bytes(storage.read_bytes(MODEL_FILES[0]))
        except FileNotFoundError as error:
            raise _no_model(storage) from error
        return read(directory)


def _no_model(storage: Storage) -> CheckpointError:
    return CheckpointError(
        f"{storage.root_uri}: is not the directory of a model: {storage.url(MODEL_FILES[0])} does not exist"
    )


@functools.cache
def _downloads() -> "tempfile.TemporaryDirectory[str]":
    """Of this process; removed when it ends."""
    return tempfile.TemporaryDirectory(prefix="blt-models-")


@functools.cache
def _download(uri: str, wanted: Callable[[str], bool]) -> str:
    """Fetch the files of a model whose paths are `wanted`; its directory below `_downloads()`, named like the URI, as
    it will show in error messages.
    """
    storage = Storage(uri)
    sizes = storage.sizes()
    present = [path for path in sizes if wanted(path)]
    if MODEL_FILES[0] not in present:
        raise _no_model(storage)
    directory = uri.partition("://")[2]
    for path in present:
        target = Path(_downloads().name) / directory / path
        target.parent.mkdir(parents=True, exist_ok=True)
        with storage.open(path) as source, target.open("wb") as copy:
            shutil.copyfileobj(source, copy, BLOCK_BYTES)
    logger.info("fetched model=%s bytes=%d", uri, sum(sizes[path] for path in present))
    return directory
