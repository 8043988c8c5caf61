"""Entropies that another patch dataset stores, used again: the origin they must share, and their rows beside the text.

Another rule then costs no inference. What is made is byte for byte what the model would give under that rule in a
dataset that stores its entropies.
"""

from collections.abc import Iterable, Iterator

import pyarrow as pa

from blt.errors import ConfigError, DataError
from pipelines.manifest import Manifest, read_manifest
from pipelines.patch.commit import read_plan
from pipelines.patch.plan import EntropyOrigin
from pipelines.patch.rows import RowStream, stored_columns
from pipelines.schema import ENTROPY_FIELD
from pipelines.storage import Storage

_KEYS = ("doc_id", "n_bytes")


def stored_origin(
    root: str, documents: Manifest, *, entropy_model: str | None, reset_on_newline: bool
) -> EntropyOrigin:
    """What made the entropies of the patch dataset at `root`; ConfigError if they cannot serve, saying what would do.

    `entropy_model` is the fingerprint of the model that is asked for, None if any will do.
    """
    manifest = read_manifest(root)
    if manifest.patching is None or not manifest.entropies or manifest.patching.entropy_model is None:
        raise ConfigError(
            f"reuse_entropies {root} stores no entropies; patch with store_entropies=true once, or leave it out"
        )
    settings = _settings(Storage(root))
    if settings["documents"] != documents.fingerprint:
        raise ConfigError(
            f"reuse_entropies {root} was made from documents {str(settings['documents'])[:12]}..., these are "
            f"{documents.fingerprint[:12]}...; give the documents it was made from, or leave it out"
        )
    origin = EntropyOrigin(
        entropy_model=manifest.patching.entropy_model,
        reset_on_newline=manifest.patching.reset_on_newline,
        dtype=manifest.patching.dtype,
        device=manifest.patching.device,
        row_bytes=int(str(settings["row_bytes"])),
    )
    if entropy_model not in (None, origin.entropy_model):
        raise ConfigError(
            f"reuse_entropies {root} was made with entropy model {origin.entropy_model[:12]}..., entropy_model is "
            f"{str(entropy_model)[:12]}...; leave one of the two out"
        )
    if reset_on_newline != origin.reset_on_newline:
        raise ConfigError(
            f"reset_on_newline is {reset_on_newline}, the entropies of reuse_entropies {root} were made with "
            f"{origin.reset_on_newline}; set it to {str(origin.reset_on_newline).lower()}, or leave reuse_entropies out"
        )
    return origin


def _settings(storage: Storage) -> dict[str, object]:
    try:
        _, settings = read_plan(storage)
    except FileNotFoundError as error:
        raise DataError(
            f"reuse_entropies {storage.root_uri} has lost its _plan.json: copy the dataset whole"
        ) from error
    return settings


def with_stored_entropies(tables: Iterable[pa.Table], storage: Storage, path: str) -> Iterator[pa.Table]:
    """The row groups of a document shard, each with the column `entropies` of the same rows in the file `path` of
    `storage`, however that one cuts its row groups; DataError if its rows are others.
    """
    stored = RowStream(stored_columns(storage, path, [*_KEYS, ENTROPY_FIELD.name]))
    for table in tables:
        beside = stored.take(table.num_rows)
        if beside is None or not beside.select(_KEYS).equals(table.select(_KEYS)):
            raise DataError(f"shard {storage.url(path)} does not hold the documents whose entropies are reused")
        yield table.append_column(ENTROPY_FIELD, beside[ENTROPY_FIELD.name])
