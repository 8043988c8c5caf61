"""The README's tree and commands: every module is in it, and every file and command it names exists."""

import re
from pathlib import Path

from jobs.invocation import COMMANDS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def tree() -> set[str]:
    """Paths of the modules in the README's tree."""
    folder, found = "", set()
    for line in README.splitlines():
        if match := re.fullmatch(r"(jobs|pipelines|blt)(/\w+)*/", line):
            folder = match.group()
        elif match := re.match(r"    (\w+\.py) +\S", line):
            found.add(folder + match.group(1))
    return found


def test_the_tree_names_every_module_once_and_no_other() -> None:
    modules = {
        str(path.relative_to(ROOT))
        for package in ("blt", "pipelines", "jobs")
        for path in (ROOT / package).rglob("*.py")
        if path.name not in ("__init__.py", "__main__.py")
    }
    assert tree() == modules


def test_commands_and_links_exist() -> None:
    assert set(re.findall(r"^    blt ([a-z-]+) ", README, re.MULTILINE)) <= set(COMMANDS)
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for goal in re.findall(r"(?:`|^    )make ([a-z-]+)", README, re.MULTILINE):
        assert re.search(rf"^{goal}:", makefile, re.MULTILINE), goal
