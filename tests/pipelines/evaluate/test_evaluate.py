"""Evaluation on a local Ray: the documents' sums, the same on any number of actors, refused where it does not fit."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from blt.checkpoint import language_model_config, language_model_fingerprint, load, save_language_model
from blt.entropy_model import document_nats
from blt.errors import CheckpointError, ConfigError, DataError
from blt.patching import PatchRule
from pipelines.evaluate import EvaluateConfig, Evaluation, evaluate, read_evaluation, write_evaluation
from pipelines.evaluate.actor import EvaluateActor, EvaluateUnit
from pipelines.evaluate.evaluate import check_patching
from pipelines.evaluate.evaluation import bootstrap_interval
from pipelines.evaluate.scoring import score_documents
from pipelines.manifest import Manifest, Patching, read_manifest, write_manifest
from tests.pipelines.train.patched import naive_row_group, random_document, write_patches
from tests.small_language_model import RULE, save_small_language_model, small_language_model

SHARDS = {
    "train/shard-00000.parquet": [random_document(99, 50)],
    "valid/shard-00000.parquet": [random_document(seed, length) for seed, length in enumerate([80, 0, 130, 5, 40])],
    "valid/shard-00001.parquet": [],
    "valid/shard-00002.parquet": [random_document(seed, 30) for seed in range(10, 14)],
}
SOURCES = {"valid/shard-00002.parquet": "other"}
VALID = [document for path, documents in SHARDS.items() if path.startswith("valid") for document in documents]
CONFIG = EvaluateConfig(sequence_patches=20, sequence_bytes=48, batch_bytes=100, bootstrap_resamples=50, max_actors=2)
PATCHING = Patching(
    entropy_model=small_language_model().entropy_fingerprint,
    rule=RULE,
    reset_on_newline=False,
    dtype="float32",
    device="cpu",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_small_language_model(tmp_path_factory.mktemp("evaluate") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_patches(tmp_path_factory.mktemp("evaluate") / "data", SHARDS, patching=PATCHING, sources=SOURCES)


@pytest.fixture(scope="module")
def evaluation(model: str, data: str, ray_local: None) -> Evaluation:
    return evaluate(CONFIG, model, data)


@pytest.mark.ray
def test_it_is_the_sum_over_the_documents_of_the_split(evaluation: Evaluation, model: str, data: str) -> None:
    language_model = load(model)
    assert language_model.entropy_model is not None
    text_bytes = sum(len(document.text) for document in VALID)
    nats = score_documents(
        language_model.model, naive_row_group(VALID), sequence_patches=20, sequence_bytes=48, batch_bytes=100
    )
    assert (evaluation.documents, evaluation.bytes) == (len(VALID), text_bytes)
    assert evaluation.patches == sum(document.num_patches for document in VALID)
    assert evaluation.mean_patch_bytes == evaluation.bytes / evaluation.patches
    assert evaluation.nats == pytest.approx(nats.sum(), rel=1e-5)  # float32, other batches
    assert evaluation.bpb == evaluation.nats / (math.log(2) * text_bytes)
    assert evaluation.bpb_low < evaluation.bpb < evaluation.bpb_high
    by_entropy_model = torch.cat(document_nats(language_model.entropy_model, [d.text for d in VALID])).double().sum()
    assert evaluation.entropy_model_bpb == pytest.approx(float(by_entropy_model) / (math.log(2) * text_bytes), rel=1e-5)
    assert evaluation.baselines["order-0"] < 8 < evaluation.baselines["gzip -9"]  # random bytes
    assert evaluation.model == language_model_fingerprint(model)
    assert evaluation.data == read_manifest(data).fingerprint


@pytest.mark.ray
def test_sources_add_up(evaluation: Evaluation) -> None:
    assert [figures.source for figures in evaluation.per_source] == ["other", "test"]
    for name in ("documents", "bytes", "patches"):
        assert sum(getattr(figures, name) for figures in evaluation.per_source) == getattr(evaluation, name)
    assert sum(figures.nats for figures in evaluation.per_source) == pytest.approx(evaluation.nats, rel=1e-12)


@pytest.mark.ray
def test_the_number_of_actors_changes_nothing(evaluation: Evaluation, model: str, data: str) -> None:
    seen: list[int] = []
    alone = evaluate(dataclasses.replace(CONFIG, max_actors=1), model, data, seen.append)
    timing = {"seconds": 0.0, "bytes_per_second": 0.0}
    assert dataclasses.replace(alone, **timing) == dataclasses.replace(evaluation, **timing)
    assert sum(seen) == evaluation.bytes


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_counts_that_are_not_the_manifests_are_an_error(model: str, tmp_path: Path) -> None:
    root = write_patches(tmp_path, SHARDS, patching=PATCHING)
    manifest = read_manifest(root)
    changed = [
        dataclasses.replace(shard, patches=(shard.patches or 0) + 1) if shard.path.startswith("valid") else shard
        for shard in manifest.shards
    ]
    write_manifest(root, dataclasses.replace(manifest, shards=tuple(changed)))
    with pytest.raises(DataError, match=r"valid/shard-00000\.parquet holds"):
        evaluate(CONFIG, model, root)


def test_a_model_without_a_finite_loss_is_named(data: str, tmp_path: Path) -> None:
    broken = small_language_model()
    with torch.no_grad():
        next(iter(broken.model.parameters())).fill_(math.nan)
    save_language_model(broken, tmp_path)
    actor = EvaluateActor(config=CONFIG, model=str(tmp_path), data=data)
    with pytest.raises(CheckpointError, match=r"valid/shard-00000\.parquet is not finite"):
        actor.score(EvaluateUnit(path="valid/shard-00000.parquet", row_group=0))


def test_patches_of_something_else_are_refused(model: str, data: str) -> None:
    manifest, here = read_manifest(data), language_model_config(model)
    check_patching(manifest, data, here, model)
    for changes, name in [
        ({"entropy_model": "0" * 64}, "entropy_model is 000000000000 there"),
        ({"rule": dataclasses.replace(RULE, threshold=2.5)}, "rule.threshold is 2.5 there, 3.0 for the model"),
        ({"rule": dataclasses.replace(RULE, max_patch_length=9)}, "rule.max_patch_length is 9 there"),
        ({"reset_on_newline": True}, "reset_on_newline is True there, False for the model"),
    ]:
        patching = dataclasses.replace(PATCHING, **changes)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=name):
            check_patching(dataclasses.replace(manifest, patching=patching), data, here, model)
    # Where the entropies were computed is not what the model was trained on.
    patching = dataclasses.replace(PATCHING, dtype="bfloat16", device="cuda")
    check_patching(dataclasses.replace(manifest, patching=patching), data, here, model)


def test_a_rule_without_entropies_needs_no_entropy_model(tmp_path: Path) -> None:
    rule = PatchRule(kind="space", max_patch_length=6)
    model = save_small_language_model(tmp_path / "model", rule)
    root = write_patches(tmp_path / "data", SHARDS)
    check_patching(read_manifest(root), root, language_model_config(model), model)


def test_documents_and_an_empty_split_are_refused(model: str, data: str, tmp_path: Path) -> None:
    write_manifest(str(tmp_path), Manifest(kind="documents", shards=(), counts={}))
    with pytest.raises(DataError, match="holds documents"):
        evaluate(CONFIG, model, str(tmp_path))
    only_train = write_patches(tmp_path / "train", {"train/shard-00000.parquet": VALID}, patching=PATCHING)
    with pytest.raises(DataError, match="the valid split holds no bytes"):
        evaluate(CONFIG, model, only_train)


@pytest.mark.parametrize("name", ["sequence_patches", "sequence_bytes", "batch_bytes", "bootstrap_resamples"])
def test_values_out_of_range_name_their_key(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        EvaluateConfig(**{name: 0})  # type: ignore[arg-type]


def test_the_interval_is_over_documents() -> None:
    num_bytes = np.full(400, 100)
    same = bootstrap_interval(np.full(400, 70.0), num_bytes, 200, 0)
    assert same[0] == pytest.approx(same[1])
    nats = np.random.default_rng(0).normal(70, 7, 400)
    low, high = bootstrap_interval(nats, num_bytes, 1000, 0)
    mean, deviation = nats.mean() / (math.log(2) * 100), nats.std() / 20 / (math.log(2) * 100)
    assert low == pytest.approx(mean - 1.96 * deviation, abs=0.3 * deviation)  # percentiles of 1,000 resamples
    assert high == pytest.approx(mean + 1.96 * deviation, abs=0.3 * deviation)
    assert bootstrap_interval(nats, num_bytes, 1000, 0) == (low, high)
    assert bootstrap_interval(np.asarray([1.0, 5.0]), np.asarray([0, 10]), 50, 0)[0] > 0  # a document without bytes


@pytest.mark.ray
def test_it_is_read_as_it_was_written(evaluation: Evaluation, tmp_path: Path) -> None:
    write_evaluation(str(tmp_path), evaluation)
    assert read_evaluation(str(tmp_path)) == evaluation
    (tmp_path / "evaluation.json").write_text("{}")
    with pytest.raises(DataError, match=r"evaluation\.json"):
        read_evaluation(str(tmp_path))
