"""`blt generate`: the continuation, then the result; a terminal sees it as it is made."""

import io
import json
from pathlib import Path

import pytest

from blt.checkpoint import load
from blt.generation import generate
from jobs import generate as generate_job
from jobs.command_line import main
from tests.small_language_model import save_small_language_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_small_language_model(tmp_path_factory.mktemp("generate") / "model")


class Terminal(io.StringIO):
    """Standard output as a terminal, with every write kept apart."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[str] = []

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.writes.append(text)
        return super().write(text)


def test_the_continuation_comes_before_the_result(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", f"model={model}", "prompt=Hé", "seed=3", "max_new_bytes=12", "top_k=50", "top_p=0.9"]
    assert main(arguments) == 0
    text, result = capsys.readouterr().out.rstrip("\n").rsplit("\n", 1)
    expected = generate(load(model), "Hé".encode(), max_new_bytes=12, temperature=0.8, top_k=50, top_p=0.9, seed=3)
    assert isinstance(expected, bytes)
    assert text == expected.decode("utf-8", "replace")
    values = json.loads(result)
    assert (values["status"], values["seed"], values["bytes"]) == ("done", 3, len(expected))
    assert values["bytes_per_second"] > 0


def test_a_fresh_seed_is_named_and_gives_the_same_again(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", f"model={model}", "max_new_bytes=9"]) == 0
    text, result = capsys.readouterr().out.rstrip("\n").rsplit("\n", 1)
    assert main(["generate", f"model={model}", "max_new_bytes=9", f"seed={json.loads(result)['seed']}"]) == 0
    assert capsys.readouterr().out.rstrip("\n").rsplit("\n", 1)[0] == text


def test_the_sample_is_recorded_once(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", f"model={model}", "prompt=a", "seed=1", "max_new_bytes=10", f"output={tmp_path}"]
    assert main(arguments) == 0
    first = capsys.readouterr().out.rstrip("\n").rsplit("\n", 1)
    sample = json.loads((tmp_path / "sample.json").read_text(encoding="utf-8"))
    assert sample["prompt"] == "a"
    assert sample["text"] == first[0]
    assert sample["seed"] == 1
    assert main(arguments) == 0
    again = capsys.readouterr().out.rstrip("\n").rsplit("\n", 1)
    assert again[0] == first[0]
    assert json.loads(again[1])["status"] == "skipped"
    assert main([*arguments, "temperature=0"]) == 2
    assert "temperature" in capsys.readouterr().err


def test_a_terminal_sees_whole_characters_as_they_come(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = [b"a", "é".encode()[:1], "é".encode()[1:], b"\xff", "日".encode()[:2]]
    monkeypatch.setattr(generate_job, "stream", lambda *arguments, **keys: iter(pieces))
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    result = generate_job.run(generate_job.Config(model=model))
    assert terminal.getvalue() == "aé\ufffd\ufffd\n"
    assert [text for text in terminal.writes if text.strip()][:3] == ["a", "é", "\ufffd"]
    assert result.bytes == 6


def test_nothing_to_generate(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", f"model={model}", "max_new_bytes=0"]) == 0
    text, result = capsys.readouterr().out.rstrip("\n").rsplit("\n", 1)
    assert text == ""
    assert json.loads(result)["bytes"] == 0


@pytest.mark.parametrize(
    ("arguments", "status", "named"),
    [
        (["model=nowhere"], 1, "nowhere/config.json"),
        ([], 2, "model"),
        (["model={model}", "max_new_bytes=-1"], 2, "max_new_bytes"),
        (["model={model}", "temperature=-1"], 2, "temperature"),
        (["model={model}", "top_p=2"], 2, "top_p"),
        (["model={model}", "temprature=1"], 2, "temperature"),
        (["model={broken}"], 1, "model.safetensors"),
    ],
)
def test_errors_are_one_line(
    model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    status: int,
    named: str,
) -> None:
    broken = save_small_language_model(tmp_path / "broken")
    (tmp_path / "broken/model.safetensors").write_bytes(b"not weights")
    given = [argument.format(model=model, broken=broken) for argument in arguments]
    assert main(["generate", *given]) == status
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 1
    assert named in captured.err
    assert json.loads(captured.out.splitlines()[-1])["status"] == "failed"
