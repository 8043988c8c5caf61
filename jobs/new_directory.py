"""A directory that appears whole or not at all: written under a temporary name beside its own, then moved there."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from blt.errors import ConfigError


@contextmanager
def new_directory(key: str, path: str | Path) -> Iterator[Path]:
    """A directory to write into; at the end it becomes `path`, on an error it is removed.

    ConfigError, naming the configuration's `key`, if there is something at `path`. What a killed process leaves has a
    name that begins with a dot and ends with .tmp.
    """
    target = Path(path)
    if target.exists() or target.is_symlink():
        raise ConfigError(f'key "{key}": {target} exists; choose another directory, or remove it')
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        # Fails if another process made `path` meanwhile and put something into it.
        os.rename(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
