"""The adapter to lm-evaluation-harness on small local tasks, without a network: the harness's figures are those
computed here from the logits of whole texts.
"""

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lm_eval.api.instance import Instance

from blt.checkpoint import LanguageModel, load
from blt.entropy_model import document_entropies
from blt.errors import ConfigError
from blt.generation import generate
from blt.patching import PatchRule, document_patch_starts
from blt.vocabulary import BOS, EOS, encode
from jobs.command_line import main
from jobs.harness_model import HarnessModel, decoded, generation
from pipelines.evaluate.respondent import Generation
from tests.small_language_model import save_small_language_model

QUESTIONS = [
    {"question": "Which of them is a colour?", "choices": ["green", "Überbau", "a"], "answer": 0},
    {"question": "", "choices": ["yes", "no"], "answer": 1},
    {"question": "Zwölf Boxkämpfer\njagen", "choices": ["Viktor", "日本"], "answer": 0},
    {"question": "one two three", "choices": ["four", "five", "six", "seven"], "answer": 3},
]
TEXTS = [{"text": "Four score and seven years ago"}, {"text": "Zwölf Boxkämpfer jagen Viktor.\n"}, {"text": "日本"}]
PROMPTS = ["Four score", "Zwölf", "a b c d e f g"]
STOPS = ["é", "th", "\n"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    rule = PatchRule(threshold=5.0333, max_patch_length=6)  # near the median of its entropies
    return save_small_language_model(tmp_path_factory.mktemp("harness") / "model", rule)


@pytest.fixture(scope="module")
def lm(model: str) -> LanguageModel:
    return load(model)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, lm: LanguageModel) -> Path:
    """Three tasks, one for each kind of request; every other target of the last is what the model writes."""
    root = tmp_path_factory.mktemp("tasks")
    written = [
        generate(lm, f"{prompt}:".encode(), max_new_bytes=8, stop=[s.encode() for s in STOPS]) for prompt in PROMPTS
    ]
    goals = [decoded(text) if number % 2 == 0 else "something else" for number, text in enumerate(map(bytes, written))]
    prompts = [{"prompt": prompt, "goal": goal} for prompt, goal in zip(PROMPTS, goals, strict=True)]
    write_task(root, "blt_choice", QUESTIONS, output_type="multiple_choice", doc_to_text="{{question}}",
               doc_to_choice="choices", doc_to_target="answer",
               metric_list=[metric("acc"), metric("acc_norm")])  # fmt: skip
    write_task(root, "blt_rolling", TEXTS, output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="text",
               metric_list=[metric("bits_per_byte", "bits_per_byte", False)])  # fmt: skip
    write_task(root, "blt_until", prompts, output_type="generate_until", doc_to_text="{{prompt}}:",
               doc_to_target="goal", generation_kwargs={"until": STOPS, "max_gen_toks": 8, "do_sample": False},
               metric_list=[metric("exact_match")])  # fmt: skip
    return root


def metric(name: str, aggregation: str = "mean", higher_is_better: bool = True) -> dict[str, object]:
    return {"metric": name, "aggregation": aggregation, "higher_is_better": higher_is_better}


def write_task(root: Path, name: str, rows: list[dict[str, object]], **keys: object) -> None:
    data = root / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    task = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test", "metadata": {"version": 1}, **keys}  # fmt: skip
    (root / f"{name}.yaml").write_text(yaml.safe_dump(task, allow_unicode=True), encoding="utf-8")


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))


def log_probabilities(lm: LanguageModel, text: bytes) -> torch.Tensor:
    """ln p [n + 1, V] after BOS and each byte of a text: one pass over all of it, patched offline."""
    assert lm.entropy_model is not None
    (entropies,) = document_entropies(lm.entropy_model, [text])
    starts = [True, *document_patch_starts(text, entropies, lm.patch_rule).tolist()]
    places = [place for place, start in enumerate(starts) if start]
    ids = torch.cat((torch.tensor([BOS]), encode(text)))
    with torch.inference_mode():
        lengths = torch.tensor(np.diff([*places, len(starts)]))
        return lm.model(ids[None], lengths[None], torch.zeros_like(ids)[None])[0].log_softmax(-1)


def ln_p(lm: LanguageModel, context: str, continuation: str) -> float:
    first, text = len(context.encode()), (context + continuation).encode()
    found = log_probabilities(lm, text)[torch.arange(first, len(text)), encode(text)[first:]]
    return float(found.sum())


def is_greedy(lm: LanguageModel, context: str, continuation: str) -> bool:
    first, text = len(context.encode()), (context + continuation).encode()
    found = log_probabilities(lm, text)[first : len(text)].clone()
    found[:, [special for special in range(4) if special != EOS]] = -math.inf
    return found.argmax(-1).tolist() == encode(text)[first:].tolist()


def requests(kind: str, arguments: list[tuple[object, ...]]) -> list[Instance]:
    return [Instance(kind, {}, pair, number) for number, pair in enumerate(arguments)]


def test_log_likelihoods_are_those_of_the_logits(model: str, lm: LanguageModel) -> None:
    pairs = [(row["question"], f" {choice}") for row in QUESTIONS for choice in row["choices"]]
    next_bytes = {prompt: bytes(generate(lm, prompt.encode(), max_new_bytes=1)) for prompt in "abcdefghij"}
    pairs += [("Four score", ""), ("", "a"), *((p, byte.decode()) for p, byte in next_bytes.items() if byte.isascii())]
    found = HarnessModel(model, batch_bytes=100).loglikelihood(requests("loglikelihood", pairs))
    # Float32 sums in another order: 1e-6 of sums of some hundred nats.
    assert [value for value, _ in found] == pytest.approx([ln_p(lm, *pair) for pair in pairs], rel=1e-5, abs=1e-5)
    assert [greedy for _, greedy in found] == [is_greedy(lm, *pair) for pair in pairs]
    assert found[-1][1], "what the model itself writes is greedy"
    assert not all(greedy for _, greedy in found)


def test_tasks_of_a_directory(model: str, lm: LanguageModel, tasks: Path, tmp_path: Path,
                              capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    output = tmp_path / "evaluation"
    arguments = ["eval", "harness", f"model={model}", "tasks=[blt_choice, blt_rolling, blt_until]",
                 f"include_path={tasks}", f"output={output}", "samples=true", "batch_prompts=2"]  # fmt: skip
    assert main(arguments) == 0
    table, line = capsys.readouterr().out.rstrip("\n").rsplit("\n", 1)
    result, results = json.loads(line), json.loads((output / "harness.json").read_text(encoding="utf-8"))
    assert "bits_per_byte" in table
    assert result["documents"] == len(QUESTIONS) + len(TEXTS) + len(PROMPTS)
    of_task = results["results"]

    by_choice = [[ln_p(lm, row["question"], f" {choice}") for choice in row["choices"]] for row in QUESTIONS]
    right = [int(np.argmax(found)) == row["answer"] for found, row in zip(by_choice, QUESTIONS, strict=True)]
    assert of_task["blt_choice"]["acc,none"] == np.mean(right) == result["blt_choice/acc"]

    nats = -sum(ln_p(lm, "", row["text"]) for row in TEXTS)
    bpb = nats / math.log(2) / sum(len(row["text"].encode()) for row in TEXTS)
    assert of_task["blt_rolling"]["bits_per_byte,none"] == pytest.approx(bpb, rel=1e-6)
    assert result["blt_rolling/bits_per_byte"] == round(bpb, 4)

    assert of_task["blt_until"]["exact_match,none"] == pytest.approx(2 / 3)
    samples = [json.loads(row) for row in (output / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    written = [sample["resps"][0][0] for sample in samples if sample["task"] == "blt_until"]
    assert written == [
        decoded(bytes(generate(lm, f"{prompt}:".encode(), max_new_bytes=8, stop=[s.encode() for s in STOPS])))
        for prompt in PROMPTS
    ]
    assert results["config"]["contexts_cut"] == 0
    assert "pretty_env_info" not in results

    assert main(arguments) == 0
    again, line = capsys.readouterr().out.rstrip("\n").rsplit("\n", 1)
    assert again == table
    assert json.loads(line)["status"] == "skipped"
    assert main([*arguments, "num_fewshot=1"]) == 2
    assert "num_fewshot" in capsys.readouterr().err


def test_a_task_of_the_directory_that_changed_is_another_input(
    model: str, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "tasks"
    own.mkdir()
    (own / "t.yaml").write_bytes((tasks / "blt_rolling.yaml").read_bytes())
    arguments = ["eval", "harness", f"model={model}", "tasks=blt_rolling", f"include_path={own}",
                 f"output={tmp_path / 'out'}", "limit=1"]  # fmt: skip
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out.rstrip("\n").rsplit("\n", 1)[1])["documents"] == 1
    (own / "more.txt").write_text("x", encoding="utf-8")
    assert main(arguments) == 2
    assert "inputs have changed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        pytest.param(["tasks=blt_nothing"], "blt_nothing", marks=pytest.mark.slow),  # reads the whole index
        (["tasks=[]"], "tasks"),
        (["tasks=blt_until", "include_path=nowhere"], "include_path"),
        (["tasks=blt_until", "limit=0"], "limit"),
        (["tasks=blt_until", "sequence_bytes=0"], "sequence_bytes"),
    ],
)
def test_what_cannot_be_evaluated_is_named(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: list[str], named: str
) -> None:
    assert main(["eval", "harness", f"model={model}", f"output={tmp_path / 'out'}", *settings]) == 2
    assert named in capsys.readouterr().err


@pytest.mark.slow
def test_the_harness_has_the_model_on_its_own_command_line(model: str, tasks: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "jobs.harness_model", "run", "--model", "blt",
               "--model_args", f"model={model},sequence_bytes=64", "--tasks", "blt_rolling",
               "--include_path", str(tasks), "--output_path", str(tmp_path / "results.json")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=110)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("results*.json")
    results = json.loads(file.read_text(encoding="utf-8"))
    assert results["config"]["sequence_bytes"] == 64
    assert results["results"]["blt_rolling"]["bits_per_byte,none"] > 0
    assert results["model_name_sanitized"] or results["config"]["model"] == "blt"


def test_long_contexts_are_cut_and_told(model: str, lm: LanguageModel, caplog: pytest.LogCaptureFixture) -> None:
    adapter = HarnessModel(model, sequence_bytes=32)
    context = "日" * 20
    (found,) = adapter.loglikelihood(requests("loglikelihood", [(context, " four")]))
    # 30 bytes fit beside BOS and EOS: 5 of the continuation and 8 characters of 3 bytes.
    assert found[0] == pytest.approx(ln_p(lm, "日" * 8, " four"), rel=1e-5)
    assert adapter.get_model_info()["contexts_cut"] == 1
    assert adapter.get_model_info()["context_bytes_cut"] == 36
    assert "contexts_cut=1 bytes_cut=36" in caplog.text
    (text,) = adapter.generate_until(requests("generate_until", [(context, {"max_gen_toks": 9, "until": []})]))
    assert text == decoded(bytes(generate(lm, ("日" * 7).encode(), max_new_bytes=9)))


def test_draws_are_repeatable_and_differ_between_repeats(model: str) -> None:
    arguments = ("Four", {"do_sample": True, "temperature": 1.0, "max_gen_toks": 12, "until": ["\n\n"]})
    asked = requests("generate_until", [arguments] * 3 + [("other", arguments[1])])
    found = HarnessModel(model).generate_until(asked)
    assert len(set(found[:3])) == 3
    assert HarnessModel(model, batch_size=1).generate_until(asked) == found
    assert HarnessModel(model, seed=1).generate_until(asked) != found


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, Generation(max_new_bytes=99)),
        ({"until": "\n", "max_tokens": 5}, Generation(max_new_bytes=5, stop=(b"\n",))),
        ({"until": ["", "ü"], "max_gen_toks": 7}, Generation(max_new_bytes=7, stop=("ü".encode(),))),
        ({"until": None, "temperature": 0.5, "do_sample": False}, Generation(max_new_bytes=99)),
        ({"temperature": 1, "top_k": 3, "top_p": 0.9}, Generation(max_new_bytes=99, temperature=1, top_k=3, top_p=0.9)),
        ({"temperature": 0.5, "top_k": -1}, Generation(max_new_bytes=99, temperature=0.5)),
    ],
)  # fmt: skip
def test_arguments_of_generation(arguments: Mapping[str, object], expected: Generation) -> None:
    assert generation(arguments, 99) == expected


def test_arguments_without_effect_are_told_once(model: str, caplog: pytest.LogCaptureFixture) -> None:
    arguments = {"num_beams": 4, "max_tokens": 1, "until": "x"}
    HarnessModel(model).generate_until(requests("generate_until", [("a", arguments), ("b", arguments)]))
    assert caplog.text.count("change nothing here: num_beams\n") == 1


def test_bytes_become_text() -> None:
    assert decoded("日本".encode()[:-1]) == "日"
    assert decoded(b"a\xffb") == "a\ufffdb"


def test_answers_are_kept_for_the_harness(model: str) -> None:
    class Kept:
        def __init__(self) -> None:
            self.found: list[tuple[object, ...]] = []

        def add_partial(self, *found: object) -> None:
            self.found.append(found)

    adapter, kept = HarnessModel(model), Kept()
    adapter.set_cache_hook(kept)
    (answer,) = adapter.loglikelihood(requests("loglikelihood", [("a", "b")]))
    (rolled,) = adapter.loglikelihood_rolling(requests("loglikelihood_rolling", [("ab",)]))
    assert kept.found == [("loglikelihood", ("a", "b"), answer), ("loglikelihood_rolling", ("ab",), rolled)]


def test_other_arguments_are_refused(model: str) -> None:
    with pytest.raises(ConfigError, match="window is no argument"):
        HarnessModel(model, window=3)
    with pytest.raises(ConfigError, match="dtype"):
        HarnessModel(model, dtype="float16")
    assert HarnessModel(model, device="cuda:0", batch_size="auto").batch_sizes == {0: 16}


def test_without_the_extra_it_is_named(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "lm_eval" else pytest.fail(name))
    assert main(["eval", "harness", f"model={model}", "tasks=any"]) == 2
    assert 'pip install \\"blt-ray[eval]\\"' in capsys.readouterr().out
