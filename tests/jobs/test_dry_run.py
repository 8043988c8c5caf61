"""`blt train --dry-run`: figures that add up, nothing written and nothing started, and the errors of a real run."""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from blt.checkpoint import entropy_model_fingerprint, save_language_model
from blt.device_peak import PUBLISHED
from blt.layers import RopeScaling
from blt.patching import PatchRule
from jobs.command_line import main
from pipelines.manifest import Patching
from tests.llama_checkpoint import SHAPE, write_llama
from tests.pipelines.patch.corpus import prose, write_documents
from tests.pipelines.train.patched import PATCHING, random_document, write_patches
from tests.pipelines.train.tiny_run import write_tiny_patches
from tests.small_language_model import RULE, save_small_language_model, small_language_model

CONFIG = """
steps: 40
global_batch: 8
micro_batch: 2
sequence_bytes: 256
sequence_patches: 48
workers: 2
gpus_per_worker: 1
precision: bfloat16
model:
  local_encoder: &local {width: 32, layers: 1, heads: 2, window: 32, ffn_multiple_of: 16}
  latent: {width: 64, layers: 2, heads: 2, window: null, ffn_multiple_of: 16}
  local_decoder: *local
  cross_attention: {heads: 2, slots: 2}
  hash_embedding: {group_sizes: [3, 4], table_size: 100}
"""
ENTROPY_CONFIG = """
steps: 40
global_batch: 4
sequence_bytes: 128
model:
  transformer: {width: 32, layers: 2, heads: 2, window: 32, ffn_multiple_of: 16}
"""
Figures = dict[str, float]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny_patches(tmp_path_factory.mktemp("dry_run") / "patches")


@pytest.fixture
def command(data: str, tmp_path: Path) -> list[str]:
    (tmp_path / "run.yaml").write_text(CONFIG)
    return ["train", "--config", str(tmp_path / "run.yaml"), f"data={data}", f"output={tmp_path / 'out'}"]


def last_json(capsys: pytest.CaptureFixture[str]) -> Figures:
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert isinstance(found, dict)
    return found


def parts(figures: Figures, total: str) -> float:
    """Sum of the parts that stand beside a total, one level below it."""
    return sum(figures[key] for key in figures if key.startswith(f"{total}.") and key.count(".") == 1)


def figures_of(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> Figures:
    assert main([*arguments, "--dry-run"]) == 0
    return last_json(capsys)


def test_figures_add_up(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    found = figures_of([*command, "--device", "H200", "--mfu", "0.25"], capsys)
    assert parts(found, "parameters") == found["parameters"]
    assert parts(found, "flops_per_byte") == pytest.approx(found["flops_per_byte"])
    state = [found[f"memory_bytes.{part}"] for part in ("weights", "gradients", "moments", "working")]
    assert sum(state) == found["memory_bytes"] == found["memory_bytes.of_2_workers"]
    moment = ("gathered_weights", "gathered_gradients", "activations", "lookups", "table_gradient")
    assert found["memory_bytes.working"] == sum(found[f"memory_bytes.working.{part}"] for part in moment)
    assert found["micro_batch.most.peak_bytes"] >= found["memory_bytes.working.activations"]
    assert found["micro_batch.most.peak_bytes"] > found["micro_batch.usual.peak_bytes"]
    assert found["traffic_bytes"] == sum(found[f"traffic_bytes.{part}"] for part in ("weights", "gradients", "tables"))
    assert (found["device"], found["device_flops"], found["device_memory_bytes"]) == ("H200", 989e12, 141e9)
    speed = 2 * 989e12 * 0.25
    assert found["bytes"] == 40 * found["step_bytes"]
    assert found["estimated_seconds"] == pytest.approx(found["bytes"] * found["flops_per_byte"] / speed)
    assert found["micro_steps"] == 2
    assert (found["micro_batch.most.row_bytes"], found["micro_batch.most.row_patches"]) == (256, 48)
    assert found["epochs.large"] == found["epochs.small"] == pytest.approx(40 / found["steps_per_epoch"], rel=1e-3)


def test_nothing_is_written_and_no_ray_is_started(
    command: list[str], data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "init", None)
    before = {path: path.stat().st_mtime_ns for path in Path(data.removeprefix("file://")).rglob("*")}
    assert before
    assert main([*command, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert not (tmp_path / "out").exists()
    for line in (
        "hash tables",
        "an epoch",
        "H100 of 989 TFLOP/s (published, bfloat16)",
        "fits H100",
        "fewest that fit",
    ):
        assert line in " ".join(shown.split()), line


def test_the_ways_to_survive_and_to_recompute_differ(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    command.append("global_batch=64")  # as many rows in a micro-batch of 16 workers
    sharded = figures_of(command, capsys)
    replicated = figures_of([*command, "survival=replicated"], capsys)
    assert replicated["memory_bytes.weights"] == 4 * replicated["parameters"]
    assert replicated["memory_bytes.weights"] > 1.9 * sharded["memory_bytes.weights"]
    assert (replicated["traffic_bytes.weights"], replicated["traffic_bytes.tables"]) == (0, 0)
    assert replicated["memory_bytes.of_1_workers"] == replicated["memory_bytes.of_16_workers"]
    less = figures_of([*command, "activation_checkpointing=full"], capsys)
    assert less["micro_batch.most.kept_bytes"] < sharded["micro_batch.most.kept_bytes"] / 2


def test_workers_that_fit_are_found(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    sizes = figures_of(command, capsys)
    room = sizes["memory_bytes.of_4_workers"]
    assert sizes["memory_bytes.of_2_workers"] > room
    found = figures_of([*command, f"device_memory_bytes={room}"], capsys)
    assert 2 < found["smallest_fitting_workers"] <= 4
    assert figures_of([*command, "device_memory_bytes=1"], capsys)["smallest_fitting_workers"] is None


def test_an_elastic_run_shows_its_fewest_workers(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    found = figures_of([*command, "workers=6", "min_workers=3"], capsys)
    shown = {key for key in found if key.startswith("memory_bytes.of_")}
    assert shown == {f"memory_bytes.of_{workers}_workers" for workers in (1, 2, 3, 4, 6, 8, 16, 32)}


def test_the_entropy_model_has_a_forecast_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On this machine's processor, whose speed is measured."""
    shards = {"train/shard-00000.parquet": [prose(1, 5000)], "valid/shard-00000.parquet": [prose(2, 500)]}
    documents = write_documents(tmp_path / "documents", shards)
    (tmp_path / "run.yaml").write_text(ENTROPY_CONFIG)
    arguments = ["train-entropy", "--config", str(tmp_path / "run.yaml"), f"documents={documents}", "output=out"]
    found = figures_of(arguments, capsys)
    assert found["parameters"] == found["parameters.transformer"]
    assert (found["device"], found["device_flops_source"]) == ("cpu", "measured here")
    assert found["device_flops"] > 1e8
    assert found["smallest_fitting_workers"] is None
    assert found["micro_batch.most.row_patches"] is None
    assert found["estimated_seconds"] == pytest.approx(
        found["bytes"] * found["flops_per_byte"] / (found["device_flops"] * 0.4)
    )
    assert math.isclose(found["steps_per_epoch"], 5002 / 127.5 / 4, rel_tol=0.05)


def test_a_run_from_a_llama_shows_what_goes_where(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = replace(SHAPE, width=64, ffn_multiple_of=16)
    write_llama(tmp_path / "llama", shape)
    assert main([*command, "--dry-run", "--init-latent-from", str(tmp_path / "llama")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for told in (
        f"Latent transformer from {tmp_path / 'llama'}: 2 layers, N = 0 to 1",
        "self_attn.{q,k,v}_proj attention.wqkv 192 x 64",
        "100,608 parameters taken; learning rate of the latent transformer: 0.1 x that of the rest",
        "left out: lm_head.weight, model.embed_tokens.weight, model.norm.weight",
    ):
        assert told in shown
    given = [*command, "--init-latent-from", str(tmp_path / "llama")]
    assert "0.5 x that of the rest" in whole_output([*given, "optimizer.latent_lr_scale=0.5"], capsys)
    write_llama(tmp_path / "scaled", replace(shape, rope_scaling=RopeScaling(factor=8.0)))
    scaled = [*command, "--init-latent-from", str(tmp_path / "scaled")]
    status, error = failure(scaled, capsys)
    assert status == 2
    assert error.startswith(
        f'key "init_latent_from": {tmp_path}/scaled/config.json does not fit the key "model.latent": '
    )
    assert "rope_scaling is factor=8.0 low_freq_factor=1.0" in error
    assert f"Latent transformer from {tmp_path / 'scaled'}: 2 layers" in whole_output(
        [*scaled, "model.latent.rope_scaling.factor=8"], capsys
    )
    status, error = failure([*given, "model.latent.rope_scaling.factor=0.5"], capsys)
    assert status == 2
    assert error.endswith('key "model.latent.rope_scaling.factor" must be at least 1 and finite, got 0.5')


def whole_output(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main([*arguments, "--dry-run"]) == 0
    return capsys.readouterr().out


def test_the_shape_may_be_that_of_the_model_to_start_from(
    command: list[str], data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_language_model(small_language_model(PatchRule(kind="byte")), tmp_path / "model")
    sizes = ["steps=2", "global_batch=2", "sequence_bytes=512"]
    rest = ["train", f"data={data}", f"output={tmp_path / 'out'}", *sizes]
    assert failure(rest, capsys) == (
        2,
        'key "model" is missing: it gives the shape of the BLT, unless init_from names a model',
    )
    status, error = failure([*rest, "--init-from", str(tmp_path / "model")], capsys)
    assert (status, "rule.kind is" in error, "init_other_patches=true" in error) == (2, True, True)
    given = [*rest, "--init-from", str(tmp_path / "model"), "init_other_patches=true"]
    found = figures_of(given, capsys)
    assert found["parameters"] == sum(p.numel() for p in small_language_model().model.parameters())
    with_llama = [*given, "--init-latent-from", "x"]
    assert failure(with_llama, capsys)[0] == 2


def test_the_entropy_model_may_be_that_of_the_model_to_start_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = save_small_language_model(tmp_path / "model", RULE)
    patching = Patching(
        entropy_model=entropy_model_fingerprint(tmp_path / "model/entropy_model"),
        rule=RULE,
        reset_on_newline=False,
        dtype="float32",
        device="cpu",
    )
    documents = {f"{split}/a.parquet": [random_document(1, 90)] for split in ("train", "valid")}
    own = write_patches(tmp_path / "own", documents, patching=patching)
    other = write_patches(tmp_path / "other", documents, patching=replace(patching, entropy_model="ab" * 32))
    sizes = ["steps=2", "global_batch=2", "sequence_bytes=512", "sequence_patches=200"]
    command = ["train", f"output={tmp_path / 'out'}", *sizes, "--init-from", directory]
    assert figures_of([*command, f"data={own}"], capsys)["parameters"]
    status, error = failure([*command, f"data={other}", "init_other_patches=true"], capsys)
    assert status == 2
    assert error.startswith('key "entropy_model" is missing: the patches of')


def failure(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    status = main([*arguments, "--dry-run"])
    return status, str(last_json(capsys)["error"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--mfu", "0"], 'key "mfu" must lie above 0 and be at most 1, got 0.0'),
        (["--mfu", "40"], 'key "mfu" must lie above 0 and be at most 1, got 40.0'),
        (["--mfu", "much"], 'command line: key "mfu": expected'),
        (["device_flops=0"], 'key "device_flops" must be a finite number above 0, or null, got 0.0'),
        (["--device", "Z80"], 'key "device": "Z80" is not known (accepted: B200, H200, H100 PCIe, H100,'),
        (
            ["precision=float32"],
            'key "device": the published peak of H100 is that of bfloat16, but precision is float32',
        ),
        (["sources={lost: 1}"], "sources: there is no source 'lost' (there are large, small)"),
        (["init_from=nowhere"], "nowhere"),
        (["sequence_patches=1"], "sequence_patches"),
    ],
)
def test_what_can_be_mended_is_named(
    given: list[str], message: str, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    status, error = failure([*command, *given], capsys)
    assert message in error
    assert status == (1 if "init_from=nowhere" in given else 2)


def test_an_unknown_device_can_be_described(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    described = ["--device", "Z80", "device_flops=1e12", "device_memory_bytes=65536"]
    found = figures_of([*command, *described], capsys)
    assert (found["device"], found["device_flops_source"]) == ("Z80", "given")
    assert found["smallest_fitting_workers"] is None


def test_data_and_entropy_model_are_checked_as_in_a_run(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = {"train/a.parquet": [b"text"], "valid/a.parquet": [b"text"]}
    documents = write_documents(tmp_path / "documents", shards)
    assert failure([*command, f"data={documents}"], capsys) == (
        1,
        f"{documents} holds documents, but this training needs patches",
    )
    empty = write_patches(tmp_path / "empty", {"train/a.parquet": [], "valid/a.parquet": []})
    assert failure([*command, f"data={empty}"], capsys) == (1, f"{empty}: the train split holds no bytes")
    with_model = dataclasses.replace(PATCHING, entropy_model="ab" * 32)
    documents_of = {f"{split}/a.parquet": [random_document(1, 90)] for split in ("train", "valid")}
    data = write_patches(tmp_path / "with_model", documents_of, patching=with_model)
    assert failure([*command, f"data={data}"], capsys) == (
        2,
        f'key "entropy_model" is missing: the patches of {data} were made with one (abababababab)',
    )


def test_options_of_the_forecast_are_none_of_a_run(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--mfu", "0.4"]) == 2
    assert last_json(capsys)["error"] == "command line: --mfu goes with --dry-run"
    assert main([*command, "mfu=0.4"]) == 2
    assert 'key "mfu" is not known' in str(last_json(capsys)["error"])
    assert main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--mfu VALUE" in shown
    assert "the same as mfu=VALUE with --dry-run" in shown
    assert "settings of --dry-run:\n  device = null" in shown
    assert max(map(len, shown.splitlines())) <= 100


def test_names_of_published_devices_are_found_before_parts_of_them() -> None:
    names = [device.name for device in PUBLISHED]
    for number, name in enumerate(names):
        assert not any(earlier in name for earlier in names[:number]), name
