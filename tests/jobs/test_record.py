"""job.json: done work is skipped, other work in the same place refused."""

import json
import uuid
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from blt.errors import ConfigError, DataError
from jobs.record import JobResult, read_record, run_once
from pipelines.storage import Storage
from tests.s3_server import S3Server


@dataclass(frozen=True, kw_only=True)
class Rule:
    threshold: float = 1.5


@dataclass(frozen=True, kw_only=True)
class Config:
    output: str
    rule: Rule = Rule()
    input: tuple[str, ...] = ("a",)
    workers: int = 1


RESULT = JobResult(documents=3, bytes=30, bpb=2.5, figures={"gzip_bpb": 2.8})


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place for outputs."""
    if request.param == "local":
        return str(tmp_path)
    s3: S3Server = request.getfixturevalue("s3")
    return s3.url(uuid.uuid4().hex)


def test_done_work_is_skipped_with_its_result(root: str) -> None:
    config = Config(output=f"{root}/a/b")
    first = run_once(config.output, config, "inputs", lambda: RESULT)
    again = run_once(config.output, config, "inputs", lambda: pytest.fail("the work was done twice"))
    assert (first.status, first.path, first.bpb) == ("done", config.output, 2.5)
    assert again == replace(first, status="skipped")
    assert json.loads(Storage(root).read_bytes("a/b/job.json"))["config"]["rule"] == {"threshold": 1.5}
    assert Storage(root).list() == ["a/b/job.json"]


@pytest.mark.parametrize(
    ("other", "inputs", "message"),
    [
        ({"rule": Rule(threshold=2.0)}, "inputs", 'key "rule.threshold" was 1.5, is 2.0'),
        ({"input": ("a", "b")}, "inputs", 'key "input" was ["a"], is ["a", "b"]'),
        ({}, "others", "its inputs have changed since"),
    ],
)
def test_other_work_in_the_same_place_is_refused(
    other: dict[str, object], inputs: str, message: str, tmp_path: Path
) -> None:
    config = Config(output=str(tmp_path))
    run_once(tmp_path, config, "inputs", lambda: RESULT)
    with pytest.raises(ConfigError) as refusal:
        run_once(tmp_path, replace(config, **other), inputs, lambda: RESULT)  # type: ignore[arg-type]
    assert message in str(refusal.value)
    assert "choose another output, or remove" in str(refusal.value)


def test_ignored_keys_have_no_say(tmp_path: Path) -> None:
    run_once(tmp_path, Config(output="here"), "inputs", lambda: RESULT, ignore=("output", "workers"))
    moved = Config(output="there", workers=8)
    assert run_once(tmp_path, moved, "inputs", lambda: RESULT, ignore=("output", "workers")).status == "skipped"


def test_incomplete_work_is_gone_on_with(root: str) -> None:
    config = Config(output=root)
    assert run_once(root, config, "inputs", lambda: replace(RESULT, status="incomplete")).status == "incomplete"
    assert read_record(root) is None
    assert run_once(root, config, "inputs", lambda: RESULT).status == "done"


def test_failed_work_leaves_no_record(tmp_path: Path) -> None:
    def fail() -> JobResult:
        raise DataError("empty corpus")

    with pytest.raises(DataError):
        run_once(tmp_path, Config(output="o"), "inputs", fail)
    assert read_record(tmp_path) is None


@pytest.mark.parametrize("content", ["", '{"version": 1, "config"', "[]", '{"version": 1}', '{"version": 9}'])
def test_broken_record_is_named(content: str, root: str) -> None:
    Storage(root).write_replace("job.json", content.encode())
    with pytest.raises(DataError, match=rf"{root}/job\.json: (is broken .* remove it|has version 9)"):
        read_record(root)


def test_result_survives_json() -> None:
    result = replace(RESULT, seconds=1.5, path="p")
    assert JobResult.from_plain(json.loads(result.to_json())) == result
    assert "patches" not in result.to_json()
    with pytest.raises(ValueError, match="bytes"):
        JobResult(figures={"bytes": 1})
