"""Environment variables for the length of a block: settings that Ray takes from nowhere else."""

import contextlib
import os
from collections.abc import Iterator, Mapping


@contextlib.contextmanager
def environment_defaults(defaults: Mapping[str, str]) -> Iterator[None]:
    """Sets the variables that the user has not set, for Ray and its workers, and takes them back afterwards."""
    added = {name: value for name, value in defaults.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextlib.contextmanager
def environment_without(*names: str) -> Iterator[None]:
    """Takes variables away that would override an argument, and puts them back afterwards."""
    taken = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(taken)
