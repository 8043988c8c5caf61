"""`blt generate`: prompts from anywhere, the continuation as it is made, then the result; exact bytes are kept."""

import base64
import io
import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blt.checkpoint import load
from blt.entropy_model import document_entropies
from blt.generation import Piece, generate
from blt.patching import document_patch_starts
from jobs import generate as generate_job
from jobs.command_line import main
from jobs.shown_text import PATCH_BORDER
from pipelines.model_files import store_model
from pipelines.storage import Storage
from tests.s3_server import S3Server
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
    pieces = [b"a", "é".encode()[:1], "é".encode()[1:], b"\xff", b"\x1b", "日".encode()[:2]]
    script(monkeypatch, pieces)
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    result = generate_job.run(generate_job.Config(model=model))
    assert terminal.getvalue() == "aé\ufffd\\x1b\ufffd\n"
    assert [text for text in terminal.writes if text.strip()][:3] == ["a", "é", "\ufffd"]
    assert result.bytes == 7
    assert base64.b64decode(str(result.figures["text_base64"])) == b"".join(pieces)


def script(monkeypatch: pytest.MonkeyPatch, pieces: list[bytes]) -> None:
    """Has the model find these bytes, and a patch start with every piece."""

    def found(*arguments: object, **keys: object) -> Iterator[tuple[int, Piece]]:
        for data in pieces:
            yield 0, Piece(data=data, starts=(True, *[False] * (len(data) - 1)))

    monkeypatch.setattr(generate_job, "continuations", found)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, dict[str, Any]]:
    """What the command printed before its last line, and that."""
    assert main(["generate", *arguments]) == 0
    shown, result = capsys.readouterr().out.rstrip("\n").rsplit("\n", 1)
    return shown, json.loads(result)


def pipe_in(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_a_prompt_comes_from_anywhere(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rest = (f"model={model}", "seed=3", "max_new_bytes=4")
    expected = generate(load(model), b'"a\xff"\n', max_new_bytes=4, temperature=0.8, seed=3)
    assert isinstance(expected, bytes)
    (tmp_path / "prompt").write_bytes(b'"a\xff"\n')
    ways: list[tuple[str, ...]] = [('"a\udcff"\n',), ("--file", str(tmp_path / "prompt")), ("-",), ("--file", "-")]
    for way in ways:
        pipe_in(monkeypatch, b'"a\xff"\n')
        assert printed(capsys, *way, *rest)[0] == expected.decode("utf-8", "replace"), way


def test_lines_are_prompts_of_their_own(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [b"one", b"", b"\xfftwo\r", b"one"]
    lm = load(model)
    expected = [generate(lm, prompt, max_new_bytes=5, temperature=0.8, seed=3) for prompt in prompts[:3]]
    expected.append(expected[0])
    for batch, end in ((16, b"\n"), (3, b"")):
        pipe_in(monkeypatch, b"\n".join(prompts) + end)
        arguments = ("-", "--lines", f"model={model}", "seed=3", "max_new_bytes=5", f"batch_prompts={batch}")
        shown, result = printed(capsys, *arguments)
        samples = [json.loads(line) for line in shown.splitlines()]
        assert [sample["prompt"] for sample in samples] == ["one", "", "\ufffdtwo\r", "one"]
        assert base64.b64decode(samples[2]["prompt_base64"]) == prompts[2]
        assert [exact(sample) for sample in samples] == expected
        assert (result["prompts"], result["bytes"], result["seed"]) == (4, sum(map(len, expected)), 3)


def exact(sample: dict[str, Any]) -> bytes:
    return base64.b64decode(sample["text_base64"]) if "text_base64" in sample else sample["text"].encode()


def test_lines_on_a_terminal_are_paragraphs(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    config = generate_job.Config(model=model, prompt="a\x1b\nb", lines=True, max_new_bytes=4, temperature=0.0)
    generate_job.run(config)
    paragraphs = terminal.getvalue().split("> ")[1:]
    assert [paragraph.split("\n")[0] for paragraph in paragraphs] == ["a\\x1b", "b"]
    assert "\x1b" not in terminal.getvalue()


def test_patches_are_marked_where_they_start(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown, _ = printed(capsys, f"model={model}", "Four", "seed=5", "max_new_bytes=16", "--show-patches")
    lm = load(model)
    data = generate(lm, b"Four", max_new_bytes=16, temperature=0.8, seed=5)
    assert isinstance(data, bytes)
    assert lm.entropy_model is not None
    (entropies,) = document_entropies(lm.entropy_model, [b"Four" + data])
    starts = document_patch_starts(b"Four" + data, entropies, lm.patch_rule)[4:-1].tolist()
    borders = [i for i, starts_patch in enumerate(starts) if starts_patch]
    parts = [data[a:b] for a, b in zip([0, *borders], [*borders, len(data)], strict=True)]
    assert len(borders) > 1
    assert shown == PATCH_BORDER.join(part.decode("utf-8", "backslashreplace") for part in parts)


def test_a_stop_string_ends_the_continuation(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    whole = generate(load(model), b"a", max_new_bytes=12, temperature=0.0)
    assert isinstance(whole, bytes)
    stop = next(whole[i : i + 1] for i in range(1, 12) if whole[i] < 0x80 and whole.index(whole[i : i + 1]) == i)
    arguments = [f"model={model}", "a", "max_new_bytes=12", "temperature=0"]
    _, result = printed(capsys, *arguments, f"stop=[{json.dumps(stop.decode())}]")
    assert result["bytes"] == whole.index(stop)


def test_a_cut_character_is_kept_exactly(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = [b"ok ", "日".encode()[:2]]
    script(monkeypatch, pieces)
    arguments = (f"model={model}", "--show-patches", f"output={tmp_path}")
    shown, result = printed(capsys, *arguments)
    assert shown == f"{PATCH_BORDER}ok {PATCH_BORDER}\\xe6\\x97"
    assert base64.b64decode(result["text_base64"]) == b"".join(pieces)
    sample = json.loads((tmp_path / "sample.json").read_text(encoding="utf-8"))
    assert (sample["text"], sample["valid_utf8"], sample["patch_starts"]) == ("ok \ufffd", False, [0, 3])
    assert base64.b64decode(sample["text_base64"]) == b"".join(pieces)
    # Shown again as it was, or in the other way, without the model.
    script(monkeypatch, [b"another"])
    assert printed(capsys, *arguments)[0] == shown
    assert printed(capsys, f"model={model}", f"output={tmp_path}")[0] == "ok \ufffd"


def test_samples_of_lines_are_recorded_once(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, output = tmp_path / "prompts.txt", tmp_path / "samples"
    file.write_text("one\ntwo\n")
    arguments = ["--file", str(file), "--lines", f"model={model}", "max_new_bytes=5", f"output={output}"]
    shown, result = printed(capsys, *arguments)
    assert (output / "samples.jsonl").read_text(encoding="utf-8") == shown + "\n"
    again, skipped = printed(capsys, *arguments)
    assert again == shown
    assert skipped == result | {"status": "skipped"}
    pipe_in(monkeypatch, b"one\ntwo")  # the same prompts from elsewhere
    assert printed(capsys, "-", *arguments[2:])[1]["status"] == "skipped"
    file.write_text("one\nthree\n")
    assert main(["generate", *arguments]) == 2
    assert "its inputs have changed since" in capsys.readouterr().err
    file.write_text("one\ntwo\n")
    (output / "samples.jsonl").unlink()
    assert printed(capsys, *arguments)[1]["status"] == "done"


def test_samples_without_newer_fields_are_shown(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [f"model={model}", "a", "temperature=0", "max_new_bytes=5", f"output={tmp_path}"]
    printed(capsys, *arguments)
    sample = json.loads((tmp_path / "sample.json").read_text(encoding="utf-8"))
    older = {name: sample[name] for name in sample if name not in ("patch_starts", "text_base64")}
    (tmp_path / "sample.json").write_text(json.dumps(older), encoding="utf-8")
    assert main(["generate", *arguments, "--show-patches"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(sample["text"] + "\n")
    assert "patches are not shown" in captured.err
    (tmp_path / "sample.json").write_text("{")
    assert main(["generate", *arguments]) == 1
    assert "sample.json" in capsys.readouterr().err


def test_a_failure_on_the_way_leaves_the_result_a_line_of_its_own(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(*arguments: object, **keys: object) -> Iterator[tuple[int, Piece]]:
        yield 0, Piece(data=b"begun", starts=(False,) * 5)
        raise KeyboardInterrupt

    monkeypatch.setattr(generate_job, "continuations", found)
    assert main(["generate", f"model={model}"]) == 130
    assert capsys.readouterr().out.splitlines() == ["begun", '{"status": "failed", "error": "interrupted"}']


@pytest.mark.s3
def test_model_prompts_and_samples_on_s3(
    model: str, s3: S3Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = s3.url(uuid.uuid4().hex)
    store_model(model, f"{root}/model")
    Storage(root).write_replace("prompt", b"Four \xff")
    rest = ("seed=3", "max_new_bytes=4")
    local = printed(capsys, "Four \udcff", f"model={model}", *rest)[0]
    remote = ("--file", f"{root}/prompt", f"model={root}/model", f"output={root}/sample", *rest)
    assert [printed(capsys, *remote)[0] for _ in range(2)] == [local, local]


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
        (["model={model}", "a", "--file", "b"], 2, "and prompt_file cannot both be given"),
        (["model={model}", "--file", "nowhere.txt"], 1, "nowhere.txt"),
        (["model={model}", "--lines"], 2, "there is no line"),
        (["model={model}", "batch_prompts=0"], 2, 'key "batch_prompts" must be at least 1'),
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
