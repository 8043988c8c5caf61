"""Calibration: the sample is seeded, the threshold hits the target with the real rule, errors say what is possible."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest

from blt.checkpoint import fingerprint
from blt.entropy_model import EntropyModel, document_entropies
from blt.errors import ConfigError, DataError
from blt.patching import PatchRule, document_patch_starts
from pipelines.manifest import ShardEntry, read_manifest
from pipelines.patch import CalibrateConfig, calibrate, read_calibration, write_calibration
from pipelines.patch.calibrate import SampledDocument, find_threshold, measure
from pipelines.patch.sample import candidate_shards, choose_rows, choose_sample, read_sample
from pipelines.storage import Storage
from tests.pipelines.patch.corpus import EDGE_DOCUMENTS, prose, write_documents

RULE = PatchRule(max_patch_length=64)
TEXTS = [prose(seed, 400 + 37 * seed) for seed in range(12)]


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> str:
    shards = {f"train/shard-{i:05d}.parquet": [*TEXTS[i::3], *EDGE_DOCUMENTS] for i in range(3)}
    shards["valid/shard-00000.parquet"] = [prose(99, 5000)]
    return write_documents(tmp_path_factory.mktemp("calibrate") / "documents", shards)


@pytest.fixture(scope="module")
def sample(entropy_model: EntropyModel) -> list[SampledDocument]:
    pairs = zip(TEXTS, document_entropies(entropy_model, TEXTS), strict=True)
    return [SampledDocument(text=text, entropies=values) for text, values in pairs]


@pytest.mark.parametrize("target", [1.5, 3.0, 4.5, 8.0])
@pytest.mark.parametrize(
    "rule",
    [
        RULE,
        PatchRule(max_patch_length=12),
        dataclasses.replace(RULE, monotonic=True),
        PatchRule(),
    ],
)
def test_the_threshold_hits_the_target(sample: list[SampledDocument], rule: PatchRule, target: float) -> None:
    found = find_threshold(sample, rule, target)
    assert found.mean_patch_bytes == pytest.approx(target, rel=0.02)
    rule = dataclasses.replace(rule, threshold=found.threshold)
    starts = [document_patch_starts(d.text, d.entropies, rule).numpy()[:-1] for d in sample]
    num_bytes, num_patches = sum(len(d.text) for d in sample), sum(int(bits.sum()) for bits in starts)
    assert found.mean_patch_bytes == pytest.approx(num_bytes / num_patches, rel=1e-9)


def test_a_larger_rise_makes_fewer_patches(sample: list[SampledDocument]) -> None:
    rule = dataclasses.replace(RULE, threshold_add=0.01)
    reachable = measure(sample, rule, -1.0).mean_patch_bytes
    found = find_threshold(sample, rule, reachable * 1.5)
    assert found.mean_patch_bytes == pytest.approx(reachable * 1.5, rel=0.02)


@pytest.mark.parametrize("target", [1.0, 30.0])
def test_a_target_out_of_reach_is_refused_with_the_range(sample: list[SampledDocument], target: float) -> None:
    rule = PatchRule(max_patch_length=8, threshold_add=0.01)
    with pytest.raises(ConfigError, match=r"target_mean_patch_bytes .* out of reach: .* gives \d.\d\d to \d.\d\d"):
        find_threshold(sample, rule, target)


def test_measures_are_those_of_the_lengths(sample: list[SampledDocument]) -> None:
    row = measure(sample, RULE, -1.0)
    assert (row.mean_patch_bytes, row.p99_patch_bytes, row.one_byte_share) == (1.0, 1, 1.0)
    rows = [measure(sample, RULE, threshold) for threshold in np.linspace(0, 6, 13)]
    assert all(a.mean_patch_bytes <= b.mean_patch_bytes for a, b in itertools.pairwise(rows))
    assert rows[-1].p99_patch_bytes == 64
    assert rows[-1].one_byte_share < 0.1


def test_the_sample_is_whole_documents_from_all_shards(documents: str) -> None:
    storage, shards = Storage(documents), read_manifest(documents).split("train")
    units = choose_sample(storage, shards, 6000, seed=0)
    assert choose_sample(storage, shards, 6000, seed=0) == units
    assert choose_sample(storage, shards, 6000, seed=1) != units
    assert len({unit.path for unit in units}) == 3
    texts = [text for unit in units for text in read_sample(storage, unit)]
    assert set(texts) <= {*TEXTS, *EDGE_DOCUMENTS}
    assert b"" not in texts
    assert 6000 <= sum(map(len, texts)) == sum(unit.bytes for unit in units) < 6000 + max(map(len, TEXTS))


def test_a_long_document_is_taken_only_where_there_is_no_other() -> None:
    sizes = [np.array([10_000_000, 50, 0]), np.array([60])]
    assert choose_rows(["a", "b"], sizes, 1000, seed=0) == {0: [1], 1: [0]}
    assert choose_rows(["a", "b"], [np.array([9000, 5000, 0]), np.array([7000])], 1000, seed=0) == {0: [1]}
    assert choose_rows(["a"], [np.array([0, 0])], 1000, seed=0) == {}


def test_few_shards_of_a_large_corpus_are_looked_at() -> None:
    shards = [
        ShardEntry(path=f"train/shard-{i:05d}.parquet", split="train", documents=9, bytes=1 << 26, sha256="")
        for i in range(1000)
    ]
    chosen = candidate_shards(shards, 1 << 20, seed=0)
    assert len(chosen) == 32
    assert candidate_shards(shards, 1 << 20, seed=1) != chosen


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_calibrate_on_ray(
    documents: str, entropy_model: EntropyModel, entropy_model_directory: str, tmp_path: Path
) -> None:
    config = CalibrateConfig(rule=RULE, target_mean_patch_bytes=4.5, sample_bytes=6000, max_actors=1)
    progress: list[int] = []
    calibration = calibrate(config, documents, entropy_model_directory, progress.append)
    assert calibration.mean_patch_bytes == pytest.approx(4.5, rel=0.02)
    assert calibration.entropy_model == fingerprint(entropy_model)
    assert calibration.documents == read_manifest(documents).fingerprint
    assert calibration.rule == dataclasses.replace(RULE, threshold=calibration.threshold)
    assert sum(progress) == calibration.sample_bytes >= 6000
    assert len(calibration.table) > 8
    assert calibration.threshold in [row.threshold for row in calibration.table]
    assert list(calibration.table) == sorted(calibration.table, key=lambda row: row.threshold)
    storage = Storage(documents)
    units = choose_sample(storage, read_manifest(documents).split("train"), 6000, seed=0)
    texts = [text for unit in units for text in read_sample(storage, unit)]
    pairs = zip(texts, document_entropies(entropy_model, texts), strict=True)
    again = [SampledDocument(text=text, entropies=values) for text, values in pairs]
    assert find_threshold(again, RULE, 4.5).threshold == pytest.approx(calibration.threshold, abs=1e-3)
    write_calibration(str(tmp_path), calibration)
    assert read_calibration(str(tmp_path)) == calibration
    assert read_calibration(str(tmp_path / "calibration.json")) == calibration


def test_broken_input_and_bad_values_are_named(tmp_path: Path, documents: str) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_calibration(str(tmp_path))
    (tmp_path / "calibration.json").write_text("{}")
    with pytest.raises(DataError, match=r"calibration\.json cannot be read"):
        read_calibration(str(tmp_path))
    empty = write_documents(tmp_path / "empty", {"train/shard-00000.parquet": [b""]})
    with pytest.raises(DataError, match="no training text"):
        choose_sample(Storage(empty), read_manifest(empty).split("train"), 100, seed=0)
    for values in ({"rule": PatchRule(kind="space")}, {"target_mean_patch_bytes": 0.5}, {"sample_bytes": 0}):
        with pytest.raises(ConfigError, match=next(iter(values)).partition("_")[0]):
            CalibrateConfig(**values)
