"""Installed distributions against a lock file: exit status 1 and a line for each that differs.

    python versions.py requirements.lock

In: the lock, lines NAME==VERSION. What is installed and locked must have the locked version (a local part such as
+cu130 aside); torch and ray must be there. What the lock does not name is listed: in an image with CUDA those are the
packages of NVIDIA and Triton, whose versions torch fixes.
"""

import re
import sys
from collections.abc import Mapping
from importlib.metadata import distributions
from pathlib import Path

REQUIRED = ("blt-ray", "ray", "torch", "torchft", "boto3")


def locked_versions(text: str) -> dict[str, str]:
    """Versions by normalised name."""
    return {normal(name): version for name, version in re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE)}


def normal(name: str) -> str:
    """The one form of a distribution's name (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def differences(installed: Mapping[str, str], locked: Mapping[str, str]) -> list[str]:
    """One phrase for each distribution that is missing or has another version than the lock says."""
    missing = [f"{name} is not installed" for name in REQUIRED if name not in installed]
    return missing + [
        f"{name} is {version}, the lock says {locked[name]}"
        for name, version in sorted(installed.items())
        if name in locked and version.partition("+")[0] != locked[name]
    ]


def main(lock: str) -> int:
    locked = locked_versions(Path(lock).read_text(encoding="utf-8"))
    installed = {normal(found.name): found.version for found in distributions()}
    wrong = differences(installed, locked)
    for phrase in wrong:
        sys.stderr.write(f"{phrase}\n")
    unlocked = sorted(installed.keys() - locked.keys())
    sys.stderr.write(f"{len(installed)} installed, {len(unlocked)} not in {lock}: {', '.join(unlocked)}\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
