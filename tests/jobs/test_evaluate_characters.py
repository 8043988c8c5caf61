"""`blt eval characters`: a table, a record and every answer, from a model and a text alone."""

import json
from pathlib import Path

import pytest

from blt.checkpoint import load
from blt.generation import generate
from jobs.command_line import main
from pipelines.evaluate.character_tasks import examples, prompt
from pipelines.evaluate.characters import QuestionConfig, split_words
from pipelines.evaluate.words import common_words
from tests.small_language_model import save_small_language_model

SPEECHES = Path(__file__).parents[1] / "data" / "speeches.jsonl"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_small_language_model(tmp_path_factory.mktemp("characters") / "model")


def test_answers_are_what_the_model_generates(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "characters"
    arguments = ["eval", "characters", f"model={model}", f"words={SPEECHES}", f"output={output}",
                 "tasks=[spell, contains_char]", "examples=3", "shots=1", "seed=5"]  # fmt: skip
    assert main(arguments) == 0
    table, line = capsys.readouterr().out.rstrip("\n").rsplit("\n", 1)
    result, results = json.loads(line), json.loads((output / "characters.json").read_text(encoding="utf-8"))
    assert result["documents"] == 6
    assert {"spell", "contains_char", "contains_char_likelier"} <= set(result)
    assert "contains_char (likelier)" in table
    assert results["tasks"][0]["exact_match"]["asked"] == 3

    rows = [json.loads(row) for row in SPEECHES.read_text(encoding="utf-8").splitlines()]
    words = common_words((row["text"] for row in rows), min_letters=4, max_letters=8, most=2000)
    shot_words, asked_words = split_words(words, QuestionConfig(shots=1))
    (shot,) = examples("spell", shot_words, 1, 5, "5 shots")
    asked = examples("spell", asked_words, 3, 5, "5")
    answers = [json.loads(row) for row in (output / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(found["question"], found["answer"]) for found in answers[:3]] == [
        (example.question, example.answer) for example in asked
    ]
    longest = max(len(example.answer) for example in asked) + 2
    for found, example in zip(answers, asked, strict=False):
        text = generate(load(model), prompt([shot], example.question).encode(), max_new_bytes=longest, stop=b"\n")
        assert found["written"] == bytes(text).decode("utf-8", "replace")

    assert main([*arguments, "batch_bytes=1000"]) == 2, "windows may change a figure's last digits"
    assert "batch_bytes" in capsys.readouterr().err
    assert main(arguments) == 0
    again, line = capsys.readouterr().out.rstrip("\n").rsplit("\n", 1)
    assert again == table
    assert json.loads(line)["status"] == "skipped"


def test_nothing_is_written_without_an_output(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["eval", "characters", f"model={model}", f"words={SPEECHES}", "tasks=swap_word", "examples=1"]) == 0
    assert json.loads(capsys.readouterr().out.rstrip("\n").rsplit("\n", 1)[1])["swap_word"] in (0.0, 1.0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "status", "named"),
    [
        (["tasks=[spel]"], 2, "tasks"),
        (["examples=0"], 2, "examples"),
        (["max_letters=2"], 2, "max_letters"),
        (["words=nowhere.txt"], 1, "nowhere.txt"),
        (["most_words=50"], 1, "100 examples need 100 words"),
        (["sequence_patches=1"], 2, "sequence_patches"),
    ],
)
def test_errors_are_one_line(
    model: str, capsys: pytest.CaptureFixture[str], settings: list[str], status: int, named: str
) -> None:
    assert main(["eval", "characters", f"model={model}", f"words={SPEECHES}", *settings]) == status
    err = capsys.readouterr().err
    assert named in err.splitlines()[-1]
    assert "Traceback" not in err
