"""Imports point one way, jobs -> pipelines -> blt, and blt stands on torch, safetensors and the standard library alone.

Read from the syntax trees of all files, so imports inside functions and under conditions count as well.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAYERS = ("blt", "pipelines", "jobs")
"""From the bottom up."""
FOR_TESTS = {"transformers", "pytest", "hypothesis", "tests"}


def files_of(layer: str) -> list[Path]:
    return sorted((ROOT / layer).rglob("*.py"))


def imports_of(path: Path) -> Iterator[tuple[str, int]]:
    """Top-level names that a file imports, with their lines; relative imports are as good as their package's name."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (path.relative_to(ROOT).parts[0] if node.level else (node.module or "").split(".")[0]), node.lineno


def offences(layer: str, allowed: set[str] | None, forbidden: set[str]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in files_of(layer)
        for name, line in imports_of(path)
        if name in forbidden or (allowed is not None and name not in allowed)
    ]


def test_there_are_files() -> None:
    assert all(files_of(layer) for layer in LAYERS)


def test_blt_imports_torch_safetensors_and_the_standard_library() -> None:
    assert offences("blt", {"blt", "torch", "safetensors", *sys.stdlib_module_names}, set()) == []


@pytest.mark.parametrize("layer", LAYERS)
def test_nothing_imports_upward(layer: str) -> None:
    above = set(LAYERS[LAYERS.index(layer) + 1 :])
    assert offences(layer, None, above) == []


@pytest.mark.parametrize("layer", LAYERS)
def test_nothing_imports_what_only_tests_use(layer: str) -> None:
    """But for measurements beside a peer, where that is installed."""
    found = offences(layer, None, FOR_TESTS)
    assert [text for text in found if not re.fullmatch(r"jobs/bench/subject\.py:\d+ imports transformers", text)] == []


def test_blt_reads_no_environment() -> None:
    """Configuration reaches blt as arguments."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in files_of("blt")
        for node in ast.walk(ast.parse(path.read_text(), str(path)))
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
    ]
    assert found == []


@pytest.mark.parametrize("layer", LAYERS)
def test_no_file_is_named_after_nothing(layer: str) -> None:
    """A file has one noun as its name."""
    assert [path for path in files_of(layer) if path.stem in ("utils", "util", "common", "helpers", "misc")] == []
