"""Calibration: the sample is seeded, the threshold hits the target with the real rule, errors say what is possible."""

import dataclasses
import itertools
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from blt.checkpoint import fingerprint
from blt.entropy_model import EntropyModel, document_entropies
from blt.errors import ConfigError, DataError
from blt.patching import PatchRule, document_patch_starts
from pipelines.manifest import ShardEntry, read_manifest
from pipelines.patch import (
    CalibrateConfig,
    CalibrationRow,
    PatchConfig,
    calibrate,
    read_calibration,
    write_calibration,
)
from pipelines.patch.sample import candidate_shards, choose_rows, choose_sample, read_sample, share_sample
from pipelines.patch.threshold import SampledDocument, find_threshold, measure, measure_table
from pipelines.storage import Storage
from tests.pipelines.patch.corpus import EDGE_DOCUMENTS, prose, write_documents
from tests.s3_server import S3Server

RULE = PatchRule(max_patch_length=64)
TEXTS = [prose(seed, 400 + 37 * seed) for seed in range(12)]


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> str:
    shards = {f"train/shard-{i:05d}.parquet": [*TEXTS[i::3], *EDGE_DOCUMENTS] for i in range(3)}
    shards["train/shard-00003.parquet"] = [b"def f(x):\n    return x\n" * n for n in range(3, 20)]
    shards["train/shard-00004.parquet"] = [b"", b"one line of verse\n"]
    shards["train/shard-00005.parquet"] = [b"", b""]
    shards["valid/shard-00000.parquet"] = [prose(99, 5000)]
    sources = {f"train/shard-{i:05d}.parquet": source for i, source in ((3, "code"), (4, "verse"), (5, "void"))}
    return write_documents(tmp_path_factory.mktemp("calibrate") / "documents", shards, sources)


@pytest.fixture(scope="module")
def sample(entropy_model: EntropyModel) -> list[SampledDocument]:
    pairs = zip(TEXTS, document_entropies(entropy_model, TEXTS), strict=True)
    return [SampledDocument(source="test", text=text, entropies=values) for text, values in pairs]


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


@pytest.mark.parametrize("monotonic", [False, True])
def test_a_quantized_rule_gets_the_nearest_multiple(sample: list[SampledDocument], monotonic: bool) -> None:
    sample, rule = sample[:3], dataclasses.replace(RULE, monotonic=monotonic, quantized=True)
    rows = [measure(sample, rule, step / 32) for step in range(-180, 180)]
    for target in (1.3, 2.0, 3.0, 4.5):
        found = find_threshold(sample, rule, target)
        assert found.mean_patch_bytes in {row.mean_patch_bytes for row in rows}
        assert abs(found.mean_patch_bytes - target) == min(abs(row.mean_patch_bytes - target) for row in rows)
        table = measure_table(sample, rule, found)
        assert all(row == measure(sample, rule, round(row.threshold * 32) / 32) for row in table)
        thresholds = [row.threshold for row in table]
        assert thresholds == sorted(set(thresholds))
        assert {found.threshold - 1 / 32, found.threshold, found.threshold + 1 / 32} <= set(thresholds)


def test_a_target_between_two_multiples_is_not_refused() -> None:
    """All entropies lie in one step, so that there are 1-byte patches or patches of the limit."""
    entropies = torch.full((101,), 1.01)
    sample = [SampledDocument(source="test", text=b"x" * 100, entropies=entropies)]
    rule = PatchRule(max_patch_length=10, quantized=True)
    assert find_threshold(sample, rule, 3.0) == measure(sample, rule, 32 / 32)
    assert find_threshold(sample, rule, 8.0) == measure(sample, rule, 33 / 32)
    with pytest.raises(ConfigError, match=r"out of reach: .* gives 1\.00 to 10\.00, nearest 10\.00"):
        find_threshold(sample, rule, 10.3)
    with pytest.raises(ConfigError, match="out of reach"):
        find_threshold(sample, dataclasses.replace(rule, quantized=False), 3.0)


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


def test_the_sample_is_whole_documents_from_all_shards_and_sources(documents: str) -> None:
    storage, shards = Storage(documents), read_manifest(documents).split("train")
    units = choose_sample(storage, shards, 6000, seed=0)
    assert choose_sample(storage, shards[::-1], 6000, seed=0) == units
    assert choose_sample(storage, shards, 6000, seed=1) != units
    assert {(unit.path[-9], unit.source) for unit in units} == {
        *((str(i), "test") for i in range(3)),
        ("3", "code"),
        ("4", "verse"),
    }
    texts = {unit: list(read_sample(storage, unit)) for unit in units}
    assert b"" not in {text for found in texts.values() for text in found}
    assert all(sum(map(len, found)) == unit.bytes for unit, found in texts.items())
    assert {text for unit, found in texts.items() if unit.source == "test" for text in found} <= {
        *TEXTS,
        *EDGE_DOCUMENTS,
    }
    assert [found for unit, found in texts.items() if unit.source == "verse"] == [[b"one line of verse\n"]]
    for source in ("test", "code"):
        share = 6000 * sum(s.bytes for s in shards if s.source == source) // sum(s.bytes for s in shards)
        sampled = sum(unit.bytes for unit in units if unit.source == source)
        assert share <= sampled < share + max(map(len, TEXTS))


def test_a_long_document_is_taken_only_where_there_is_no_other() -> None:
    sizes = {"a": np.array([10_000_000, 50, 0]), "b": np.array([60])}
    assert choose_rows(sizes, 1000, 1000, seed=0) == {"a": [1], "b": [0]}
    assert choose_rows({"a": np.array([9000, 5000, 0]), "b": np.array([7000])}, 1000, 1000, seed=0) == {"a": [1]}
    assert choose_rows({"a": np.array([9000, 500, 0])}, 10, 1000, seed=0) == {"a": [1]}


def test_few_shards_of_a_large_corpus_are_looked_at() -> None:
    shards = [
        ShardEntry(
            path=f"train/shard-{i:05d}.parquet",
            split="train",
            source="rare" if i % 100 == 7 else "small" if i == 3 else "common",
            documents=9,
            bytes=20 if i == 3 else 1 << 26,
            sha256="",
        )
        for i in range(1000)
    ]
    shares = share_sample(shards, 1 << 20, seed=0)
    assert [len(share.shards) for share in shares] == [32, 1, 1]
    assert sum(share.wanted_bytes for share in shares) == pytest.approx(1 << 20, abs=3)
    assert [share.longest_bytes for share in shares] == [shares[0].wanted_bytes, (1 << 20) // 3, (1 << 20) // 3]
    assert share_sample(shards[::-1], 1 << 20, seed=0) == shares
    assert share_sample(shards, 1 << 20, seed=1) != shares
    assert len(candidate_shards(shards, 1 << 26, min_shards=2, seed=0)) == 16


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
    assert [part.source for part in calibration.sources] == ["code", "test", "verse"]
    assert sum(part.sample_bytes for part in calibration.sources) == calibration.sample_bytes
    assert sum(part.sample_documents for part in calibration.sources) == calibration.sample_documents
    for row, *parts in zip(calibration.table, *(part.table for part in calibration.sources), strict=True):
        assert {part.threshold for part in parts} == {row.threshold}
        sizes = [part.sample_bytes for part in calibration.sources]
        patches = sum(size / part.mean_patch_bytes for size, part in zip(sizes, parts, strict=True))
        assert sum(sizes) / patches == pytest.approx(row.mean_patch_bytes)
    storage = Storage(documents)
    units = choose_sample(storage, read_manifest(documents).split("train"), 6000, seed=0)
    texts = [text for unit in units for text in read_sample(storage, unit)]
    pairs = zip(texts, document_entropies(entropy_model, texts), strict=True)
    again = [SampledDocument(source="any", text=text, entropies=values) for text, values in pairs]
    assert find_threshold(again, RULE, 4.5).threshold == pytest.approx(calibration.threshold, abs=1e-3)
    write_calibration(str(tmp_path), calibration)
    assert read_calibration(str(tmp_path)) == calibration
    assert read_calibration(str(tmp_path / "calibration.json")) == calibration


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.s3
@pytest.mark.usefixtures("ray_local")
def test_calibrate_from_s3_is_the_same(s3: S3Server, documents: str, entropy_model_directory: str) -> None:
    config = CalibrateConfig(rule=RULE, target_mean_patch_bytes=3.0, sample_bytes=3000, store_entropies=True)
    here = calibrate(config, documents, entropy_model_directory)
    for name, root in (("documents", documents), ("model", entropy_model_directory)):
        local, remote = Storage(root), Storage(s3.url(f"calibrate/{name}"))
        for path in local.list():
            remote.write_replace(path, local.read_bytes(path))
    assert calibrate(config, s3.url("calibrate/documents"), s3.url("calibrate/model")) == here
    assert here.rule.quantized
    assert (here.threshold * 32).is_integer()


def test_store_entropies_seeks_multiples_with_the_rule_that_patch_uses() -> None:
    config = CalibrateConfig(rule=PatchRule(monotonic=True), store_entropies=True)
    patching = PatchConfig(rule=PatchRule(monotonic=True), store_entropies=True)
    assert config.final_rule == patching.final_rule == PatchRule(monotonic=True, max_patch_length=512, quantized=True)
    assert not CalibrateConfig().final_rule.quantized


def test_records_older_than_the_sources_are_read(tmp_path: Path) -> None:
    row = CalibrationRow(threshold=1.0, mean_patch_bytes=4.5, p99_patch_bytes=9, one_byte_share=0.1)
    values = dict.fromkeys(("threshold", "mean_patch_bytes", "target_mean_patch_bytes", "sample_documents"), 1)
    names = dict.fromkeys(("entropy_model", "documents", "dtype", "device"), "x")
    older = values | names | {"rule": {}, "reset_on_newline": False, "sample_bytes": 9, "seed": 0}
    (tmp_path / "calibration.json").write_bytes(msgspec.json.encode(older | {"table": [row]}))
    calibration = read_calibration(str(tmp_path))
    assert (calibration.table, calibration.sources, calibration.rule) == ((row,), (), PatchRule())


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
        with pytest.raises(ConfigError, match=rf"^{next(iter(values))}"):
            CalibrateConfig(**values)
