"""What a run starts from: a Llama's blocks in the latent transformer, or another model; it is part of its name.

Runs through Ray Train that start from a Llama are in test_survival.py (kill -9) and test_repeatability.py.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from blt.checkpoint import language_model_fingerprint, load, save_language_model
from blt.entropy_model import EntropyModelConfig
from blt.errors import ConfigError
from blt.interop.llama import llama_blocks
from blt.layers import RopeScaling
from blt.model import BLT, BLTConfig
from blt.optim import OptimizerConfig
from blt.patching import PatchRule
from pipelines.manifest import Patching
from pipelines.model_files import local_checkpoint
from pipelines.storage import Storage
from pipelines.train.config import TrainConfig
from pipelines.train.job import TrainJob
from pipelines.train.start import check_start, initial_weights, resolved
from tests.llama_checkpoint import write_llama
from tests.model_cases import blt_config, transformer_config
from tests.pipelines.train.test_resume import job
from tests.pipelines.train.tiny_run import CONFIG, write_tiny_patches
from tests.s3_server import S3Server
from tests.small_language_model import small_language_model

MODEL = blt_config()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny_patches(tmp_path_factory.mktemp("start") / "patches")


def job_from(data: str, output: Path, llama: Path | None, **changes: object) -> TrainJob:
    """The tiny run from a Llama, resolved as for training."""
    config = replace(CONFIG, init_latent_from=None if llama is None else str(llama), **changes)  # type: ignore[arg-type]
    return replace(
        job(data, output, "blt"), config=resolved(config), init_fingerprint=check_start(config, MODEL, patching=None)
    )


def test_the_name_of_a_run_tells_what_it_starts_from(data: str, tmp_path: Path) -> None:
    for name, how in {"llama": {}, "same, in parts": {"shard_bytes": 5000}, "other": {"seed": 9}}.items():
        write_llama(tmp_path / name, **how)  # type: ignore[arg-type]
    run = job_from(data, tmp_path, tmp_path / "llama").run
    assert job_from(data, tmp_path, tmp_path / "same, in parts").run == run
    optimizer = replace(CONFIG.optimizer, latent_lr_scale=0.1)
    assert job_from(data, tmp_path, tmp_path / "llama", optimizer=optimizer).run == run
    others = {
        job_from(data, tmp_path, tmp_path / "other").run,
        job_from(data, tmp_path, None).run,
        job_from(data, tmp_path, None, optimizer=optimizer).run,
        job_from(data, tmp_path, tmp_path / "llama", optimizer=replace(optimizer, latent_lr_scale=0.2)).run,
    }
    assert len(others | {run}) == 5


def test_weights_are_the_llama_and_the_seed(data: str, tmp_path: Path) -> None:
    write_llama(tmp_path / "llama")
    weights = job_from(data, tmp_path, tmp_path / "llama").initial_weights()
    drawn = job_from(data, tmp_path, None).initial_weights()
    wanted = {name: tensor.clone() for name, tensor in drawn.items()}
    llama_blocks(tmp_path / "llama", MODEL).place(wanted)
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)
    assert not torch.equal(weights["latent.blocks.0.attention.wo.weight"], drawn["latent.blocks.0.attention.wo.weight"])
    assert torch.equal(weights["latent.projection.weight"], drawn["latent.projection.weight"])


@pytest.mark.parametrize(
    ("llama", "given", "scale"), [(None, None, 1.0), ("llama", None, 0.1), (None, 0.5, 0.5), ("llama", 1.0, 1.0)]
)
def test_the_learning_rate_of_the_latent_transformer(llama: str | None, given: float | None, scale: float) -> None:
    config = replace(CONFIG, init_latent_from=llama, optimizer=OptimizerConfig(latent_lr_scale=given))
    assert resolved(config).optimizer.latent_lr_scale == scale


@pytest.mark.parametrize("key", ["init_from", "init_latent_from"])
def test_workers_find_what_was_given_by_a_relative_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    write_llama(tmp_path / "given")
    if key == "init_from":
        save_language_model(small_language_model(), tmp_path / "given")
    monkeypatch.chdir(tmp_path)
    config = resolved(TrainConfig(**{**vars(CONFIG), key: "given"}))
    monkeypatch.chdir("/")  # a worker's directory is another
    weights = initial_weights(config, MODEL, lambda: BLT(MODEL))
    assert weights.keys() == BLT(MODEL).state_dict().keys()


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="init_from and init_latent_from cannot both be given"):
        replace(CONFIG, init_from="a", init_latent_from="b")
    entropy_model = EntropyModelConfig(transformer=transformer_config())
    with pytest.raises(ConfigError, match='key "init_latent_from": an entropy model has no latent transformer'):
        check_start(replace(CONFIG, init_latent_from="b"), entropy_model)
    scaled = replace(CONFIG, optimizer=OptimizerConfig(latent_lr_scale=0.1))
    with pytest.raises(ConfigError, match=r'key "optimizer\.latent_lr_scale": an entropy model has no latent'):
        check_start(scaled, entropy_model)
    write_llama(tmp_path, hidden_size=32)
    with pytest.raises(ConfigError, match=r'key "init_latent_from": .*hidden_size is 32 there'):
        check_start(replace(CONFIG, init_latent_from=str(tmp_path)), MODEL)


def patching_of(directory: Path) -> Patching:
    """What would make the patches that the model in `directory` was trained on."""
    config = json.loads((directory / "config.json").read_text())
    rule = load(directory).patch_rule
    return Patching(
        entropy_model=config["entropy_model"]["fingerprint"],
        rule=replace(rule, max_patch_length=rule.max_patch_length or 512),
        reset_on_newline=False,
        dtype="float32",
        device="cpu",
    )


@pytest.mark.parametrize("longest", [6, None])
def test_a_model_goes_on_with_patches_like_its_own(tmp_path: Path, longest: int | None) -> None:
    """One without a longest patch, as imported ones are, goes with the pipeline's limit."""
    rule = PatchRule(threshold=3.0, max_patch_length=longest)
    save_language_model(small_language_model(rule), tmp_path)
    config = replace(CONFIG, init_from=str(tmp_path))
    own = patching_of(tmp_path)
    fingerprint = language_model_fingerprint(tmp_path)
    assert check_start(config, MODEL, own) == fingerprint
    for other, told in (
        (replace(own, entropy_model="ab" * 32), "entropy_model is abababababab there"),
        (replace(own, rule=replace(own.rule, threshold=2.5)), "rule.threshold is 2.5 there, 3.0 for the model"),
        (replace(own, reset_on_newline=True), "reset_on_newline is True there, False for the model"),
        (replace(own, rule=replace(own.rule, max_patch_length=7)), "rule.max_patch_length is 7 there"),
    ):
        with pytest.raises(ConfigError, match=told):
            check_start(config, MODEL, other)
        assert check_start(replace(config, init_other_patches=True), MODEL, other) == fingerprint


def test_a_model_of_another_shape_is_refused(tmp_path: Path) -> None:
    save_language_model(small_language_model(), tmp_path)
    other: BLTConfig = blt_config(latent={"layers": 3})
    with pytest.raises(ConfigError, match=r"another shape than the key \"model\": latent.layers is 2 there, 3 here"):
        check_start(replace(CONFIG, init_from=str(tmp_path)), other, patching_of(tmp_path))
    scaled = blt_config(latent={"rope_scaling": RopeScaling(factor=8)})
    with pytest.raises(ConfigError, match=r"latent.rope_scaling is None there, \{'factor': 8, .*\} here"):
        check_start(replace(CONFIG, init_from=str(tmp_path)), scaled, patching_of(tmp_path))


@pytest.mark.s3
def test_a_llama_on_s3(s3: S3Server, tmp_path: Path) -> None:
    """Its parts come with it; what else is in the directory does not."""
    write_llama(tmp_path, shard_bytes=5000)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    for file in tmp_path.iterdir():
        assert Storage(s3.url("start/llama")).write_exclusive(file.name, file.read_bytes())
    local, remote = (
        TrainConfig(**{**vars(CONFIG), "init_latent_from": w}) for w in (str(tmp_path), s3.url("start/llama"))
    )
    assert check_start(remote, MODEL) == check_start(local, MODEL)
    weights = [initial_weights(config, MODEL, lambda: BLT(MODEL)) for config in (local, remote)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    fetched = Path(local_checkpoint(s3.url("start/llama")))
    assert {path.name for path in fetched.iterdir()} == {path.name for path in tmp_path.iterdir()} - {
        "pytorch_model.bin",
        "generation_config.json",
    }
