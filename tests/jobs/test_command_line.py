"""The command line: last line, exit status and the one line of an error."""

import contextlib
import errno
import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import pytest
from ray.exceptions import RayTaskError
from ray.train import WorkerGroupError
from rich.console import Console

from blt.errors import CheckpointError, ConfigError, DataError
from jobs import invocation
from jobs.action import Action
from jobs.annotation import field_types
from jobs.command_line import main
from jobs.invocation import COMMANDS, Command, understand
from jobs.record import JobResult


@dataclass(frozen=True, kw_only=True)
class Config:
    text: str = "hello"
    """What to say."""


def wrapped(error: Exception) -> Exception:
    task: Exception = RayTaskError("work", "Traceback\n  many lines", error, ip="127.0.0.1").as_instanceof_cause()
    return WorkerGroupError("Rank 1 error:\nTraceback", {1: task})


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the command `say` do what a test gives, through a module as the real ones."""

    def make(run: Callable[[Config], JobResult], **names: object) -> None:
        module = ModuleType("say", doc="Say something.")
        vars(module).update({"Config": Config, "run": run} | names)
        monkeypatch.setitem(COMMANDS, "say", Command("say", "say something"))
        monkeypatch.setattr(invocation.importlib, "import_module", lambda name: module)

    return make


def last_line(capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, object], str]:
    captured = capsys.readouterr()
    return json.loads(captured.out.splitlines()[-1]), captured.err


def test_result_is_the_last_line(command: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    def run(config: Config) -> JobResult:
        sys.stdout.write("working\n")
        return JobResult(seconds=1.0, figures={"text": config.text})

    command(run)
    assert main(["say", "text=good day"]) == 0
    assert last_line(capsys)[0] == {"status": "done", "seconds": 1.0, "text": "good day"}


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ConfigError("key x"), 2, "key x"),
        (DataError("corpus.jsonl is empty"), 1, "corpus.jsonl is empty"),
        (wrapped(CheckpointError("model.safetensors is broken")), 1, "model.safetensors is broken"),
        (wrapped(ConfigError("key x")), 2, "key x"),
        (OSError(errno.ENOSPC, "No space left on device", "/data/part"), 1, "/data/part: No space left on device"),
        (wrapped(PermissionError(errno.EACCES, "Permission denied", "/root")), 1, "/root: Permission denied"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (SystemExit(0), 130, "interrupted"),
        (SystemExit(128 + signal.SIGTERM), 143, "terminated"),
    ],
)
def test_error_is_one_line(
    error: BaseException, status: int, message: str, command: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def run(config: Config) -> NoReturn:
        raise error

    command(run)
    assert main(["say"]) == status
    result, log = last_line(capsys)
    assert result == {"status": "failed", "error": message}
    assert log == f"blt say: error: {message}\n"


def print_at_once(config: Config) -> JobResult:
    sys.stdout.write("a line\n")
    sys.stdout.flush()
    return JobResult()


def print_late(config: Config) -> JobResult:
    sys.stdout.write("a line\n")
    return JobResult()


def print_with_rich(config: Config) -> JobResult:
    Console().print("a line")
    return JobResult()


@contextlib.contextmanager
def unread() -> Iterator[None]:
    """Standard output is a pipe that nobody reads any more. No fixture: pytest sets it anew after those."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream, contextlib.redirect_stdout(stream):
        yield


@pytest.mark.parametrize("run", [print_at_once, print_late, print_with_rich])
def test_without_a_reader_a_command_ends_quietly(
    run: Callable[[Config], JobResult], command: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    command(run)
    with unread():
        assert main(["say"]) == 141
    with unread():
        assert main(["--help"]) == 141
    assert capsys.readouterr() == ("", "")


def test_another_broken_pipe_is_a_failure(command: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    def run(config: Config) -> NoReturn:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    command(run)
    assert main(["say"]) == 1
    assert "BrokenPipeError" in str(last_line(capsys)[0]["error"])


def test_head_of_a_command() -> None:
    """As a shell runs it: no traceback, and the status of a command that ends by SIGPIPE."""
    command = f"{sys.executable} -m jobs --help | true; echo ${{PIPESTATUS[0]}}"
    found = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True, timeout=60)
    assert (found.stdout, found.stderr) == ("141\n", "")


def test_bug_shows_its_traceback(command: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    def run(config: Config) -> NoReturn:
        raise ZeroDivisionError("by zero")

    command(run)
    assert main(["say"]) == 1
    result, log = last_line(capsys)
    assert result["error"] == "ZeroDivisionError: by zero"
    assert "Traceback (most recent call last)" in log


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], '"trian" is not a command; did you mean "train"?'),
        (["say", "txt=x"], 'command line: key "txt" is not known; did you mean "text"? (accepted: text)'),
        (["say", "--config", "nope.yaml"], 'configuration file "nope.yaml" does not exist'),
        (["say", "--steps"], "command line: unrecognized arguments: --steps (see blt say --help)"),
        (["say", "--log-file", "/dev/null/log"], "--log-file /dev/null/log: cannot be written"),
    ],
)
def test_bad_usage_exits_2(
    arguments: list[str], message: str, command: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    command(lambda config: JobResult())
    assert main(arguments) == 2
    result, log = last_line(capsys)
    assert str(result["error"]).startswith(message)
    assert log.count("\n") == 1


def test_options_and_settings_mix(
    command: Callable[..., None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file, log = tmp_path / "say.yaml", tmp_path / "logs/say.log"
    file.write_text("text: from the file")
    command(lambda config: JobResult(figures={"text": config.text}))
    assert main(["say", "text=mine", "--config", str(file), "--log-file", str(log), "--verbose"]) == 0
    assert last_line(capsys)[0]["text"] == "mine"
    assert log.exists()


def test_action_runs_instead_of_the_work(command: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    def count(config: Config) -> JobResult:
        return JobResult(status="incomplete", figures={"letters": len(config.text)})

    command(lambda config: JobResult(), ACTIONS={"count": Action(count, "count letters")}, OPTIONS=("text",))
    assert main(["say", "--count", "--text", "four"]) == 1  # an incomplete result is no success
    assert last_line(capsys)[0] == {"status": "incomplete", "seconds": 0.0, "letters": 4}
    assert main(["say", "--text", "four"]) == 0
    assert last_line(capsys)[0]["status"] == "done"
    assert main(["say", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--count" in shown
    assert "count letters" in shown
    assert "--text VALUE" in shown


def test_an_action_may_have_keys_of_its_own(command: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Counting(Config):
        per_line: int = 1
        """Letters of a line."""

    def count(config: Counting) -> JobResult:
        return JobResult(figures={"lines": len(config.text) // config.per_line})

    action = Action(count, "count lines", config=Counting, options=("per_line",))
    command(lambda config: JobResult(), ACTIONS={"count": action})
    assert main(["say", "--count", "--per-line", "2", "text=four"]) == 0
    assert last_line(capsys)[0]["lines"] == 2
    assert main(["say", "--per-line", "2"]) == 2
    assert last_line(capsys)[0]["error"] == "command line: --per-line goes with --count"
    assert main(["say", "per_line=2"]) == 2
    assert 'key "per_line" is not known' in str(last_line(capsys)[0]["error"])
    assert main(["say", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "the same as per_line=VALUE with --count" in shown
    assert "settings of --count:\n  per_line = 1  [integer]\n      Letters of a line." in shown


def test_places_named_options_and_flags(command: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Parcel:
        origin: str
        target: str
        kind: str = "letter"
        fragile: bool = False

    def send(config: Parcel) -> JobResult:
        return JobResult(figures={"sent": f"{config.origin} {config.target} {config.kind} {config.fragile}"})

    names = {"as": "kind", "fragile": "fragile"}
    command(send, Config=Parcel, POSITIONAL=("origin", "target"), OPTIONS=names)
    assert main(["say", "--as", "parcel", "/a=1/here", "--fragile", "./b=2"]) == 0
    assert last_line(capsys)[0]["sent"] == "/a=1/here ./b=2 parcel True"
    assert main(["say", "here", "target=there"]) == 0
    assert last_line(capsys)[0]["sent"] == "here there letter False"
    assert main(["say", '"here', "null"]) == 0  # what stands by itself is no YAML
    assert last_line(capsys)[0]["sent"] == '"here null letter False'
    assert main(["say", "a", "b", "c"]) == 2
    assert '"c" is one argument too many (accepted: ORIGIN, TARGET)' in str(last_line(capsys)[0]["error"])
    assert main(["say", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "usage: blt say ORIGIN TARGET [--config FILE]" in shown
    assert "--as VALUE" in shown
    assert "the same as fragile=true" in shown


def test_a_command_may_have_two_words(
    command: Callable[..., None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command(lambda config: JobResult(figures={"text": config.text}))
    monkeypatch.setitem(COMMANDS, "say twice", Command("say", "say it again"))
    assert main(["say", "twice", "text=hello"]) == 0
    assert last_line(capsys)[0]["text"] == "hello"


def test_help_lists_commands_and_settings(command: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    command(lambda config: JobResult())
    assert main(["--help"]) == 0
    overview = capsys.readouterr().out
    assert all(name in overview and command.summary in overview for name, command in COMMANDS.items())
    assert main(["say", "--help"]) == 0
    text = capsys.readouterr().out
    assert "Say something." in text
    assert "  text = hello  [text]\n      What to say." in text
    assert max(map(len, (overview + text).splitlines())) <= 100


def test_who_reads_a_model_takes_it_as_an_option_too() -> None:
    """`export` and `patch` have `--model`, so nobody should have to know which others do."""
    keys = {name: field_types(importlib.import_module(it.module).Config) for name, it in COMMANDS.items()}
    readers = [name for name in keys if keys[name].get("model") in (str, str | None)]
    assert {"eval", "eval characters", "eval harness", "generate", "inspect", "export", "patch"} <= set(readers)
    for name in readers:
        assert "model=somewhere" in understand(name, ["--model", "somewhere"]).settings
