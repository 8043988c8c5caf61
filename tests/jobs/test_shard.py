"""`blt shard` as a user runs it, on real speeches."""

import json
from pathlib import Path

import pytest

from jobs.command_line import main

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_local")]

SPEECHES = Path(__file__).parents[1] / "data" / "speeches.jsonl"


def _run(capsys: pytest.CaptureFixture[str], *settings: str) -> tuple[int, dict[str, object], str]:
    code = main(["shard", *settings])
    captured = capsys.readouterr()
    return code, json.loads(captured.out.splitlines()[-1]), captured.err


def test_done_then_skipped_then_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [f"input={SPEECHES}", f"output={tmp_path / 'out'}", "valid_fraction=0.2"]
    code, result, _ = _run(capsys, *settings)
    assert code == 0
    assert result["status"] == "done"
    assert (result["documents"], result["quarantined"]) == (len(SPEECHES.read_text().splitlines()), 0)
    code, again, _ = _run(capsys, *settings)
    assert (code, again) == (0, {**result, "status": "skipped"})
    code, _, errors = _run(capsys, *settings, "seed=1")
    assert code == 2
    assert "seed" in errors


@pytest.mark.parametrize(
    ("setting", "code", "message"),
    [
        ("input=nothing.jsonl", 1, "input 'nothing.jsonl' does not exist"),
        ("text_key=body", 1, "missing required field `body` (keys: id,"),
        ("valid_fraction=1.5", 2, "must be above 0 and below 1, got 1.5"),
        ("textkey=body", 2, "text_key"),
    ],
)
def test_what_is_wrong_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str, code: int, message: str
) -> None:
    found, _, errors = _run(capsys, f"input={SPEECHES}", f"output={tmp_path / 'out'}", setting)
    assert found == code
    assert message in errors
    assert "Traceback" not in errors
