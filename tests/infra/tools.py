"""Programs that check files of infra/: a name in, its path out."""

import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
INFRA = ROOT / "infra"


def installed(name: str) -> str:
    """A program that comes with the development dependencies."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    assert found is not None, f"{name} is not installed: pip install -r requirements.lock"
    return found


def kustomize() -> list[str] | None:
    """The command that prints what a directory with a kustomization.yaml gives; None where neither program is."""
    if shutil.which("kustomize"):
        return ["kustomize", "build"]
    return ["kubectl", "kustomize"] if shutil.which("kubectl") else None
