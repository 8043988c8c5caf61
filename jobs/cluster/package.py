"""The working directory as one zip file: what a job has of it. The same files give the same bytes.

Left out: what .gitignore and .rayignore say, `excludes`, links, outputs, environments, caches, and files that usually
hold credentials. A file that holds the value of a secret variable of this environment is refused by name.
"""

import logging
import os
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

from blt.errors import ConfigError
from jobs.cluster.secrets import SECRET_FILES, held_secret, secret_values

DEFAULT_EXCLUDES = (
    "/runs",
    "/data",
    ".git",
    ".hg",
    ".svn",
    ".venv",
    "venv",
    "__pycache__",
    "*.egg-info",
    ".mypy_cache",
    ".pytest_cache",
    ".ruff_cache",
    ".hypothesis",
    ".tox",
    ".ipynb_checkpoints",
    "node_modules",
    "/build",
    "/dist",
)
"""Patterns as of .gitignore."""

MAX_FILES = 5000
SERVER_BYTES = 100 * 2**20
"""Ray's job server takes no larger request."""
_EARLIEST = (1980, 1, 1, 0, 0, 0)
_SHOWN = 3

_quiet = logging.getLogger(f"{__name__}.walk")
_quiet.disabled = True  # Ray's walk logs an exception once for each directory that it passes through


@dataclass(frozen=True, kw_only=True)
class Packaged:
    """What went into a package."""

    files: tuple[str, ...]
    """Relative to the directory, sorted."""
    bytes: int
    """Of the files, uncompressed."""


def write_package(
    directory: Path,
    target: Path,
    *,
    excludes: Sequence[str],
    max_bytes: int,
    extra: Mapping[str, bytes],
    environment: Mapping[str, str] = os.environ,
) -> Packaged:
    """Write the zip file `target` from the directory and the `extra` files, which go before those of the same name.

    ConfigError where that is more than `max_bytes` or MAX_FILES, or where a file holds a secret of the environment.
    """
    found = [file for file in _files(directory, excludes, max_bytes) if _name(directory, file) not in extra]
    contents: dict[str, Callable[[], bytes]] = {_name(directory, file): file.read_bytes for file in found}
    contents |= {name: (lambda data=data: data) for name, data in extra.items()}  # type: ignore[misc]
    secrets = secret_values(environment)
    total = 0
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as package:
        for name in sorted(contents):
            data = contents[name]()
            if (secret := held_secret(data, secrets.items())) is not None:
                raise ConfigError(
                    f"{directory / name} holds the value of {secret}, and would be sent to the cluster: take it out, "
                    f"or leave the file out with exclude='[{name}]'"
                )
            total += len(data)
            entry = zipfile.ZipInfo(name, _EARLIEST)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = (0o755 if os.access(directory / name, os.X_OK) else 0o644) << 16
            package.writestr(entry, data)
    if target.stat().st_size > SERVER_BYTES:
        raise ConfigError(
            f"the working directory {directory} takes {target.stat().st_size / 1e6:.0f} MB as a zip file, and a job "
            f"server takes {SERVER_BYTES / 1e6:.0f} MB: leave parts out with exclude='[PATTERN, ...]' or in .rayignore"
        )
    return Packaged(files=tuple(sorted(contents)), bytes=total)


def _files(directory: Path, excludes: Sequence[str], max_bytes: int) -> list[Path]:
    """The regular files to send. The walk ends where there are too many, so that it may be begun anywhere."""
    found: list[Path] = []
    sizes = Counter[str]()

    def take(path: Path) -> None:
        if not path.is_file():
            return
        found.append(path)
        sizes[_name(directory, path).partition("/")[0]] += path.stat().st_size
        if len(found) > MAX_FILES or sizes.total() > max_bytes:
            raise _too_much(directory, len(found), sizes, max_bytes)

    patterns = [*DEFAULT_EXCLUDES, *SECRET_FILES, *excludes]
    left_out = [Path.is_symlink, _get_excludes(directory, patterns)]
    _dir_travel(directory, left_out, take, include_gitignore=True, logger=_quiet)
    return found


def _too_much(directory: Path, num_files: int, sizes: Counter[str], max_bytes: int) -> ConfigError:
    largest = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in sizes.most_common(_SHOWN))
    what = f"more than {MAX_FILES} files" if num_files > MAX_FILES else f"more than {max_bytes / 1e6:.0f} MB"
    return ConfigError(
        f"the working directory {directory} has {what} to send (largest so far: {largest}): leave parts out with "
        "exclude='[PATTERN, ...]' or in .rayignore, or raise max_package_bytes"
    )


def _name(directory: Path, file: Path) -> str:
    return file.relative_to(directory).as_posix()
