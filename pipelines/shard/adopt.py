"""Creating a file of a dataset that may be there already: then it must hold the same bytes, and is adopted."""

import contextlib
import logging
from collections.abc import Iterator

from blt.errors import DataError
from pipelines.storage import NewFile, Storage

_LOGGER = logging.getLogger(__name__)


@contextlib.contextmanager
def create_or_adopt(path: str, storage: Storage) -> Iterator[NewFile]:
    """Write `path` in the block. DataError if it exists and holds something else."""
    with storage.create(path) as new:
        yield new
    if new.created:
        return
    if storage.sha256(path) != new.sha256:
        raise DataError(
            f"{storage.url(path)} exists and holds something else: an input changed under a run that was "
            "cut off, or the directory is not the job's own; choose another output or remove the directory"
        )
    _LOGGER.info("adopted=%s", path)
