"""Evaluation: the documents' sums, the same on any number of actors, refused where model and documents do not fit."""

import dataclasses
import json
import math
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from blt.checkpoint import language_model_config, language_model_fingerprint, load, save_language_model
from blt.entropy_model import document_nats
from blt.errors import CheckpointError, ConfigError, DataError
from blt.flops import entropy_flops_per_byte, flops_per_byte
from blt.patching import PatchRule
from pipelines.evaluate import (
    EvaluateConfig,
    Evaluation,
    TextConfig,
    evaluate,
    open_corpus,
    open_patched,
    read_evaluation,
    write_evaluation,
)
from pipelines.evaluate.actor import EvaluateActor
from pipelines.evaluate.documents import RowGroupUnit
from pipelines.evaluate.evaluate import check_model
from pipelines.evaluate.figures import bootstrap_interval
from pipelines.evaluate.patcher import patch_texts
from pipelines.evaluate.scoring import score_documents
from pipelines.manifest import Manifest, read_manifest, write_manifest
from pipelines.shard import SourceConfig
from tests.pipelines.evaluate.cases import CONFIG, PATCHING, RULE, SHARDS, VALID, write_files
from tests.pipelines.evaluate.in_process import evaluate_here
from tests.pipelines.train.patched import naive_row_group, write_patches
from tests.small_language_model import save_small_language_model, small_language_model


def untimed(evaluation: Evaluation) -> Evaluation:
    """All of it that a clock has no say in."""
    return dataclasses.replace(evaluation, seconds=0.0, bytes_per_second=0.0)


@pytest.fixture(scope="module")
def evaluation(model: str, data: str) -> Evaluation:
    return evaluate_here(CONFIG, model, open_patched(data, "valid"))


def test_it_is_the_sum_over_the_documents_of_the_split(evaluation: Evaluation, model: str, data: str) -> None:
    language_model = load(model)
    assert language_model.entropy_model is not None
    text_bytes = sum(len(document.text) for document in VALID)
    found = score_documents(
        language_model.model, naive_row_group(VALID), sequence_patches=20, sequence_bytes=48, batch_bytes=100
    )
    assert (evaluation.documents, evaluation.bytes) == (len(VALID), text_bytes)
    assert evaluation.patches == sum(document.num_patches for document in VALID)
    assert evaluation.mean_patch_bytes == evaluation.bytes / evaluation.patches
    assert evaluation.nats == pytest.approx(found.nats.sum(), rel=1e-5)  # float32, other batches
    assert evaluation.bpb == evaluation.nats / (math.log(2) * text_bytes)
    assert evaluation.bpb_low < evaluation.bpb < evaluation.bpb_high
    assert evaluation.accuracy == found.hits.sum() / text_bytes
    by_entropy_model = torch.cat(document_nats(language_model.entropy_model, [d.text for d in VALID])).double().sum()
    assert evaluation.entropy_model_bpb == pytest.approx(float(by_entropy_model) / (math.log(2) * text_bytes), rel=1e-5)
    assert evaluation.baselines["order-0"] < 8 < evaluation.baselines["gzip -9"]  # random bytes
    assert evaluation.model == language_model_fingerprint(model)
    assert evaluation.data == read_manifest(data).fingerprint
    assert (evaluation.split, evaluation.rows, evaluation.noise, evaluation.samples) == ("valid", {}, (), None)


def test_sources_add_up(evaluation: Evaluation) -> None:
    assert [figures.source for figures in evaluation.per_source] == ["other", "test"]
    for name in ("documents", "bytes", "patches"):
        assert sum(getattr(figures, name) for figures in evaluation.per_source) == getattr(evaluation, name)
    assert sum(figures.nats for figures in evaluation.per_source) == pytest.approx(evaluation.nats, rel=1e-12)
    for name, divisor in (("accuracy", "bytes"), ("one_byte_share", "patches")):
        parts = [getattr(part, name) * getattr(part, divisor) for part in evaluation.per_source]
        assert sum(parts) == pytest.approx(getattr(evaluation, name) * getattr(evaluation, divisor))
    assert evaluation.per_source[0].baselines != evaluation.per_source[1].baselines != evaluation.baselines


def test_flops_are_those_of_each_mean_patch_size(evaluation: Evaluation, model: str) -> None:
    language_model = load(model)
    assert language_model.entropy_model is not None
    for part in (evaluation, *evaluation.per_source):
        context = min(48.0, 20 * part.mean_patch_bytes)
        expected = flops_per_byte(language_model.config, part.mean_patch_bytes, context).forward
        of_entropies = entropy_flops_per_byte(language_model.entropy_model.config, context)
        assert (part.model_flops_per_byte, part.entropy_model_flops_per_byte) == (expected, of_entropies)
        assert part.flops_per_byte == expected + of_entropies


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_two_actors_give_what_one_process_gives(evaluation: Evaluation, model: str, data: str) -> None:
    seen: list[int] = []
    together = evaluate(CONFIG, model, open_patched(data, "valid"), seen.append)
    assert untimed(together) == untimed(evaluation)
    assert sum(seen) == evaluation.bytes


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_the_number_of_actors_changes_nothing(model: str, tmp_path: Path) -> None:
    """Not a bit, of files with noise and samples."""
    sources = tuple(SourceConfig(name=name, input=(path,)) for name, path in write_files(tmp_path).items())
    documents = open_corpus(TextConfig(sources=sources), str(tmp_path / "out"))
    assert len(documents.units()) == 2
    config = dataclasses.replace(CONFIG, noise=("drop", "upper_case"), samples=8, sample_bytes=9, temperature=1.0)
    seen: list[int] = []
    alone = evaluate(dataclasses.replace(config, max_actors=1), model, documents, seen.append)
    together = evaluate(dataclasses.replace(config, max_actors=2), model, documents)
    assert untimed(alone) == untimed(together)
    assert [row.noise for row in alone.noise] == ["clean", "drop", "upper_case"]
    assert alone.samples is not None
    assert sum(seen) == documents.input_bytes


def test_counts_that_are_not_the_manifests_are_an_error(model: str, tmp_path: Path) -> None:
    root = write_patches(tmp_path, SHARDS, patching=PATCHING)
    manifest = read_manifest(root)
    changed = [
        msgspec.structs.replace(shard, patches=(shard.patches or 0) + 1) if shard.path.startswith("valid") else shard
        for shard in manifest.shards
    ]
    write_manifest(root, dataclasses.replace(manifest, shards=tuple(changed)))
    with pytest.raises(DataError, match=r"valid/shard-00000\.parquet holds"):
        evaluate_here(CONFIG, model, open_patched(root, "valid"))


def test_a_model_without_a_finite_loss_is_named(data: str, tmp_path: Path) -> None:
    broken = small_language_model()
    with torch.no_grad():
        next(iter(broken.model.parameters())).fill_(math.nan)
    save_language_model(broken, tmp_path)
    actor = EvaluateActor(config=CONFIG, model=str(tmp_path), documents=open_patched(data, "valid"))
    with pytest.raises(CheckpointError, match=r"valid/shard-00000\.parquet is not finite"):
        actor.score(RowGroupUnit(number=0, path="valid/shard-00000.parquet", row_group=0))


def test_patches_of_something_else_are_refused(model: str, data: str) -> None:
    documents, here = open_patched(data, "valid"), language_model_config(model)
    check_model(CONFIG, documents, here, model)
    for changes, name in [
        ({"entropy_model": "0" * 64}, "entropy_model is 000000000000 there"),
        ({"rule": dataclasses.replace(RULE, threshold=2.5)}, "rule.threshold is 2.5 there, 5.129 for the model"),
        ({"rule": dataclasses.replace(RULE, max_patch_length=9)}, "rule.max_patch_length is 9 there"),
        ({"reset_on_newline": True}, "reset_on_newline is True there, False for the model"),
    ]:
        patching = dataclasses.replace(PATCHING, **changes)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=name):
            check_model(CONFIG, dataclasses.replace(documents, patching=patching), here, model)
    # Where the entropies were computed is not what the model was trained on.
    patching = dataclasses.replace(PATCHING, dtype="bfloat16", device="cuda")
    check_model(CONFIG, dataclasses.replace(documents, patching=patching), here, model)


def test_a_rule_without_a_longest_patch_is_that_of_the_pipeline(model: str, data: str) -> None:
    """As imported models have it: in a patch dataset it stands with 512 bytes, and text is cut so too."""
    unlimited = PatchRule(threshold=1e9)
    here = dataclasses.replace(language_model_config(model), patch_rule=unlimited)
    patching = dataclasses.replace(PATCHING, rule=dataclasses.replace(unlimited, max_patch_length=512))
    documents = dataclasses.replace(open_patched(data, "valid"), patching=patching)
    check_model(CONFIG, documents, here, model)
    shorter = dataclasses.replace(patching, rule=dataclasses.replace(unlimited, max_patch_length=511))
    with pytest.raises(ConfigError, match=r"rule.max_patch_length is 511 there, 512 for the model"):
        check_model(CONFIG, dataclasses.replace(documents, patching=shorter), here, model)
    (batch,) = patch_texts(small_language_model(unlimited), [b"x" * 1100], 8192)
    assert batch.group.patch_starts(0, 1).tolist() == [0, 1, 513, 1025]


def test_what_a_model_cannot_do_is_refused_before_anything_is_read(model: str, data: str, tmp_path: Path) -> None:
    documents, here = open_patched(data, "valid"), language_model_config(model)
    files = open_corpus(TextConfig(input=tuple(write_files(tmp_path).values())), str(tmp_path / "out"))
    without = dataclasses.replace(here, entropy_stored=False)
    check_model(CONFIG, documents, without, model)
    with pytest.raises(ConfigError, match=r'key "input": .* holds no entropy model'):
        check_model(CONFIG, files, without, model)
    for key, config in {"noise": {"noise": True}, "samples": {"samples": 1}}.items():
        with pytest.raises(ConfigError, match=f'key "{key}"'):
            check_model(dataclasses.replace(CONFIG, **config), documents, without, model)  # type: ignore[arg-type]
    ahead = dataclasses.replace(here, patch_rule=PatchRule(kind="top_k", patch_size=4, max_patch_length=6))
    with pytest.raises(ConfigError, match="top_k looks ahead"):
        check_model(dataclasses.replace(CONFIG, samples=1), files, ahead, model)


def test_a_rule_without_entropies_needs_no_entropy_model(tmp_path: Path) -> None:
    rule = PatchRule(kind="space", max_patch_length=6)
    model = save_small_language_model(tmp_path / "model", rule)
    root = write_patches(tmp_path / "data", SHARDS)
    found = evaluate_here(CONFIG, model, open_patched(root, "valid"))
    assert found.entropy_model_bpb is None
    assert (found.entropy_model_flops_per_byte, found.flops_per_byte) == (0.0, found.model_flops_per_byte)


def test_documents_and_an_empty_split_are_refused(tmp_path: Path) -> None:
    write_manifest(str(tmp_path), Manifest(kind="documents", shards=(), counts={}))
    with pytest.raises(DataError, match="holds documents"):
        open_patched(str(tmp_path), "valid")
    only_train = write_patches(tmp_path / "train", {"train/shard-00000.parquet": VALID}, patching=PATCHING)
    with pytest.raises(DataError, match="the valid split holds no bytes"):
        open_patched(only_train, "valid")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            (name, 0)
            for name in ("sequence_bytes", "batch_bytes", "bootstrap_resamples", "sample_bytes", "prefix_bytes")
        ),
        ("sequence_patches", 1),
        ("samples", -1),
        ("seed", -1),
        ("temperature", -0.5),
        ("noise", ("drop", "drop")),
        ("compressors", ("xz", "xz")),
    ],
)
def test_values_out_of_range_name_their_key(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name):
        EvaluateConfig(**{name: value})  # type: ignore[arg-type]


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


def test_it_is_read_as_it_was_written(evaluation: Evaluation, tmp_path: Path) -> None:
    write_evaluation(str(tmp_path), evaluation)
    assert read_evaluation(str(tmp_path)) == evaluation
    (tmp_path / "evaluation.json").write_text("{}")
    with pytest.raises(DataError, match=r"evaluation\.json"):
        read_evaluation(str(tmp_path))


BEFORE = {
    "documents": 2,
    "bytes": 100,
    "patches": 20,
    "mean_patch_bytes": 5.0,
    "nats": 140.0,
    "bpb": 2.0,
    "bpb_low": 1.9,
    "bpb_high": 2.1,
    "seconds": 1.0,
    "bytes_per_second": 10.0,
    "baselines": {"gzip -9": 3.0},
    "entropy_model_bpb": None,
    "split": "valid",
    "sequence_patches": 8,
    "sequence_bytes": 64,
    "model": "ab",
    "data": "cd",
    "per_source": [
        {"source": "a", "documents": 2, "bytes": 100, "patches": 20, "mean_patch_bytes": 5.0}
        | {"nats": 140.0, "bpb": 2.0, "entropy_model_bpb": None}
    ],
}
"""As evaluation.json was before there were accuracy, FLOPs, languages, noise and samples."""


def test_what_was_written_before_is_read(tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text(json.dumps(BEFORE))
    found = read_evaluation(str(tmp_path))
    assert (found.bpb, found.per_source[0].bpb, found.per_source[0].baselines) == (2.0, 2.0, {})
    assert (found.accuracy, found.noise, found.samples, found.per_language) == (None, (), None, ())
