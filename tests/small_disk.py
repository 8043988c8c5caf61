"""A file system that is soon full: its directory and size in, mounted for the length of a block."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def small_disk(directory: Path, kilobytes: int) -> Iterator[Path]:
    """A tmpfs at `directory`; the test is skipped where mounting is not allowed."""
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", directory]
    if os.geteuid() != 0 or subprocess.run(mount).returncode:
        pytest.skip("mounting a file system takes root")
    try:
        yield directory
    finally:
        subprocess.run(["umount", directory], check=True)
