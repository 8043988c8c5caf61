"""`blt eval` as a command: its keys, its output and its record; units run in this process."""

import contextlib
import json
from pathlib import Path

import pytest

from blt.errors import ConfigError
from jobs import evaluate
from jobs.command_line import main
from jobs.configuration import load_config
from pipelines.evaluate import read_evaluation
from tests.pipelines.evaluate.cases import RULE, write_dataset, write_files
from tests.pipelines.evaluate.in_process import use_in_process_pool
from tests.small_language_model import save_small_language_model

SMALL = ("sequence_patches=20", "sequence_bytes=48", "batch_bytes=100", "bootstrap_resamples=20")


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    use_in_process_pool(monkeypatch)
    monkeypatch.setattr(evaluate, "ray_session", contextlib.nullcontext)
    monkeypatch.setattr("torch.set_num_threads", lambda count: None)  # an actor sets those of its process


@pytest.fixture
def model(tmp_path: Path) -> str:
    return f"model={save_small_language_model(tmp_path / 'model', RULE)}"


def last_json(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert isinstance(found, dict)
    return found


@pytest.mark.usefixtures("without_ray")
def test_files_of_several_sources(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = write_files(tmp_path / "files")
    (tmp_path / "files" / "bad.jsonl").write_text("no json\n")
    sources = [{"name": name, "input": [path]} for name, path in files.items()]
    sources[0]["input"] += [str(tmp_path / "files" / "bad.jsonl")]  # type: ignore[operator]
    command = ["eval", model, f"output={tmp_path / 'out'}", *SMALL, "noise=[drop]", "samples=2", "sample_bytes=5"]
    assert main([*command, f"sources={json.dumps(sources)}"]) == 0
    captured = capsys.readouterr()
    for shown in ("code", "poems", "zstd -19", "95 % interval", "entropy model FLOPs", "Noise", "drop", "Samples:"):
        assert shown in captured.out
    assert "quarantined=1" in captured.err
    found = json.loads(captured.out.splitlines()[-1])
    evaluation = read_evaluation(str(tmp_path / "out"))
    assert (found["status"], found["documents"], found["bytes"]) == ("done", 6, evaluation.bytes)
    assert (found["rows_in"], found["quarantined"], found["filtered"]) == (7, 1, 0)
    assert found["bpb"] == round(evaluation.bpb, 4)
    assert found["bpb_zstd_19"] == round(evaluation.baselines["zstd -19"], 4)
    assert found["accuracy_drop"] == round(evaluation.noise[1].accuracy or 0, 4)
    assert {"accuracy", "flops_per_byte", "one_byte_share", "bpb_drop", "valid_utf8_share"} <= found.keys()
    (tmp_path / "files").rename(tmp_path / "moved")  # where files lie has no say, nor the order of sources
    there, here = str(tmp_path / "files"), str(tmp_path / "moved")
    moved = [{**s, "input": [path.replace(there, here) for path in s["input"]]} for s in sources[::-1]]
    assert main([*command, f"sources={json.dumps(moved)}"]) == 0
    assert last_json(capsys) == found | {"status": "skipped"}
    (tmp_path / "moved" / "code.jsonl").write_text('{"text": "other"}\n')
    assert main([*command, f"sources={json.dumps(moved)}"]) == 2
    assert "its inputs have changed" in capsys.readouterr().err


@pytest.mark.usefixtures("without_ray")
def test_a_patch_dataset_is_skipped_when_it_is_done(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = f"data={write_dataset(tmp_path / 'data')}"
    command = ["eval", model, data, f"output={tmp_path / 'out'}", *SMALL, "compressors=[]"]
    assert main(command) == 0
    found = last_json(capsys)
    assert "rows_in" not in found
    assert not [name for name in found if "zstd" in name]
    assert main(command) == 0
    assert last_json(capsys) == found | {"status": "skipped"}
    assert main([*command, "noise=true"]) == 2
    assert '"noise" was false, is true' in capsys.readouterr().err
    (tmp_path / "out" / "evaluation.json").unlink()
    assert main(command) == 0
    assert last_json(capsys)["status"] == "done"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([], r'"data" .*, input .* or sources must be given'),
        (["data=d", "input=a.jsonl"], '"input" goes with input, and not with data'),
        (["data=d", "language_key=lang"], '"language_key" goes with input'),
        (["data=d", "max_line_bytes=5"], '"max_line_bytes" goes with input'),
        (["input=a.jsonl", "split=train"], '"split" goes with data'),
        (["input=a.jsonl", "text_key=id"], '"text_key" and id_key'),
        (["input=a.jsonl", "noise=[shout]"], "noise"),
        (["input=a.jsonl", "noise=drop"], "noise"),
        (["input=a.jsonl", "compressors=[rar]"], "compressors"),
        (["input=a.jsonl", "samples=-1"], "samples"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(evaluate.Config, None, ["model=m", "output=o", *settings])


def test_noise_is_all_or_a_list() -> None:
    def noises(value: str) -> tuple[str, ...]:
        return load_config(evaluate.Config, None, ["model=m", "output=o", "data=d", f"noise={value}"]).noises

    assert noises("true") == ("ant_speak", "drop", "random_case", "repeat", "upper_case")
    assert noises("[upper_case, drop]") == ("drop", "upper_case")
    assert noises("false") == noises("[]") == ()
