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
    (removed,) = (tmp_path / "out" / "valid").iterdir()
    content = removed.read_bytes()
    removed.unlink()
    assert _run(capsys, *settings)[1]["status"] == "done"
    assert removed.read_bytes() == content
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


def test_dry_run_then_status_then_gc(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    settings = [f"input={SPEECHES}", f"output={out}", "valid_fraction=0.2"]
    code, plan, _ = _run(capsys, *settings, "group_bytes=100000", "--dry-run")
    size = SPEECHES.stat().st_size
    assert code == 0
    assert (plan["files"], plan["files.corpus"], plan["input_bytes"]) == (1, 1, size)
    assert plan["estimated_text_bytes"] == size
    assert plan["groups"] == -(-size // 100_000)
    assert not out.exists()
    code, found, _ = _run(capsys, *settings, "--status")
    assert (code, found["status"], found["groups"], found["groups_done"]) == (1, "incomplete", "not planned yet", 0)
    _run(capsys, *settings)
    code, found, _ = _run(capsys, *settings, "--status")
    assert (code, found["status"], found["groups"], found["groups_done"]) == (0, "done", 1, 1)
    assert found["stored_bytes"] == sum(file.stat().st_size for file in out.rglob("*.parquet"))
    (out / "manifest.json").rename(tmp_path / "manifest.json")
    code, found, _ = _run(capsys, *settings, "--status")
    assert (code, found["status"], found["groups_done"]) == (1, "incomplete", 1)
    for path in ("_temporary/torn", "_dedup/runs.json", "_quarantine/group-00000-00000.jsonl"):
        (out / path).parent.mkdir(exist_ok=True)
        (out / path).write_bytes(b"left")
    code, removed, _ = _run(capsys, *settings, "--gc")
    assert (code, removed["removed_leftovers"], removed["removed_scratch_files"]) == (0, 0, 0)  # young, and unfinished
    (tmp_path / "manifest.json").rename(out / "manifest.json")
    code, removed, errors = _run(capsys, *settings, "--gc", "gc_older_than_seconds=0")
    assert (code, removed["removed_leftovers"], removed["removed_leftover_bytes"]) == (0, 1, 4)
    assert removed["removed_scratch_files"] == 2
    assert "removed=_temporary/torn bytes=4" in errors
    assert "removed=_dedup/runs.json" in errors
    assert _run(capsys, *settings)[1]["status"] == "skipped"


def test_sources_may_move_and_change_their_order_but_not_their_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "x.json").write_bytes(SPEECHES.read_bytes())
        (tmp_path / place / "y.txt").write_text("a text")
    output = f"output={tmp_path / 'out'}"

    def sources(place: str, text_key: str = "text") -> list[str]:
        x = f"{{name: x, input: {tmp_path / place}/x.json, format: jsonl, text_key: {text_key}}}"
        return [x, f"{{name: y, input: [{tmp_path / place}/y.txt]}}"]

    rest = [output, "valid_fraction=0.2", "dedup=true"]
    code, result, _ = _run(capsys, f"sources=[{', '.join(sources('a'))}]", *rest)
    assert (code, result["status"]) == (0, "done")
    assert result["documents"] == len(SPEECHES.read_text().splitlines()) + 1
    code, again, _ = _run(capsys, f"sources=[{', '.join(reversed(sources('b')))}]", *rest)
    assert (code, again["status"]) == (0, "skipped")
    code, _, errors = _run(capsys, f"sources=[{', '.join(sources('a', 'title'))}]", *rest)
    assert code == 2
    assert 'key "sources.x.text_key" was "text", is "title"' in errors


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ("[{name: a}]", 'key "sources[0].input" is missing: a list of texts is required'),
        ("[{name: a, inputs: x}]", 'key "sources[0].inputs" is not known; did you mean "input"?'),
        ("[{name: a, input: x, format: csv}]", 'key "sources[0].format": expected one of auto, jsonl'),
        ('[{name: "", input: x}]', 'key "sources[0].name" must be printable and not empty'),
        ("[{name: a, input: x}, {name: a, input: y}]", 'key "sources" must have distinct names'),
        ("some", 'key "sources[0]": expected a section (keys: name, input, '),
        ("[{name: a, input: nothing.txt}]", "input 'nothing.txt' does not exist"),
    ],
)
def test_what_is_wrong_with_sources_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], sources: str, message: str
) -> None:
    code, _, errors = _run(capsys, f"sources={sources}", f"output={tmp_path / 'out'}")
    assert code in (1, 2)
    assert message in errors.splitlines()[-1]


def test_help_lists_the_keys_of_a_source(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shard", "--help"]) == 0
    text = capsys.readouterr().out
    assert "sources = []  [[section, ...]]" in text
    assert "sources[].name (required)  [text]" in text
    assert "sources[].format = auto  [auto | jsonl | txt | parquet | binary]" in text
