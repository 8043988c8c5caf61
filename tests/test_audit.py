"""The audit of the locked versions: what fails it, what is only told, and that it never needs a network."""

import importlib.util
import json
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

AUDIT = Path(__file__).parent.parent / ".ci" / "audit.py"
FLAW = {"id": "CVE-1", "fix_versions": ["2.0"], "aliases": [], "description": "It leaks."}
LEAKY = {"name": "leaky", "version": "1.0", "vulns": [FLAW]}
SOUND = {"name": "sound", "version": "1.0", "vulns": []}
UNKNOWN = {"name": "unknown", "skip_reason": "Dependency not found on PyPI"}


@pytest.fixture
def audit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit", AUDIT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("found", "accepted", "status", "said"),
    [
        ([SOUND], {}, 0, "audit: 1 packages, 0 known vulnerabilities"),
        ([SOUND, LEAKY], {}, 1, "leaky 1.0: CVE-1, fixed in 2.0: It leaks."),
        ([SOUND, LEAKY], {"CVE-1": "not used"}, 0, "audit: 2 packages, 0 known vulnerabilities"),
        ([SOUND, UNKNOWN], {}, 0, "audit: 1 packages (1 more are not known to the index), 0 known vulnerabilities"),
        ([UNKNOWN], {}, 0, "audit: skipped, the index could not be asked (it has no list of vulnerabilities)"),
        (None, {}, 0, "audit: skipped, the index could not be asked (no route to host)"),
    ],
)
def test_what_pip_audit_tells(
    found: list[dict[str, object]] | None,
    accepted: dict[str, str],
    status: int,
    said: str,
    audit: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        assert str(AUDIT.parent.parent / "requirements.lock") in command
        if found is not None:
            Path(command[-1]).write_text(json.dumps({"dependencies": found}))
        return subprocess.CompletedProcess(command, 1, "", "Traceback\nno route to host\n")

    monkeypatch.setattr(audit.subprocess, "run", run)
    monkeypatch.setattr(audit, "ACCEPTED", accepted)
    assert audit.main(["requirements.lock"]) == status
    assert said in capsys.readouterr().out


def test_silence_is_no_failure(
    audit: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def hang(command: list[str], **options: object) -> None:
        raise subprocess.TimeoutExpired(command, 30)

    monkeypatch.setattr(audit.subprocess, "run", hang)
    assert audit.main([]) == 0
    assert "audit: skipped" in capsys.readouterr().out
