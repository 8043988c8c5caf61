"""Plans: what decides the bytes of the data is in the hash, and nothing else."""

import dataclasses

import pytest

from blt.errors import ConfigError, DataError
from blt.patching import PatchRule
from pipelines.manifest import Manifest, ShardEntry, SourceCounts
from pipelines.patch.plan import PatchConfig, PatchPlan, differences, make_plan, unit_id


def _manifest(num_shards: int = 3, num_bytes: int = 10) -> Manifest:
    shards = tuple(
        ShardEntry(
            path=f"train/shard-{i:05d}.parquet",
            split="train",
            source="test",
            documents=2,
            bytes=num_bytes,
            sha256=f"{i}",
        )
        for i in range(num_shards)
    )
    rows, total = 2 * num_shards, num_bytes * num_shards
    counts = {"test": SourceCounts(rows_in=rows, rows_out=rows, quarantined=0, filtered=0, bytes=total)}
    return Manifest(kind="documents", shards=shards, counts=counts)


def _plan(config: PatchConfig | None = None, manifest: Manifest | None = None, model: str | None = "m1") -> PatchPlan:
    return make_plan(config or PatchConfig(), manifest or _manifest(), model)


def test_one_unit_for_each_shard() -> None:
    plan = _plan()
    assert [unit.id for unit in plan.units] == ["train-00000", "train-00001", "train-00002"]
    assert [unit.path for unit in plan.units] == [shard.path for shard in _manifest().shards]
    assert unit_id("valid/shard-00012.parquet") == "valid-00012"


@pytest.mark.parametrize(
    "config",
    [
        PatchConfig(rule=PatchRule(threshold=1.5, max_patch_length=512)),
        PatchConfig(rule=PatchRule(monotonic=True, max_patch_length=512)),
        PatchConfig(rule=PatchRule(max_patch_length=256)),
        PatchConfig(reset_on_newline=True),
        PatchConfig(dtype="bfloat16"),
        PatchConfig(device="cuda", gpus_per_actor=1),
        PatchConfig(row_bytes=4096),
        PatchConfig(row_group_bytes=1 << 20),
        PatchConfig(rule=PatchRule(threshold=1.25), store_entropies=True),
        PatchConfig(rule=PatchRule(threshold=1.25, quantized=True)),
    ],
)
def test_what_decides_the_bytes_is_in_the_hash(config: PatchConfig) -> None:
    assert _plan(config).hash != _plan().hash
    assert differences(_plan().settings, _plan(config).settings)


def test_inputs_are_in_the_hash() -> None:
    hashes = {_plan().hash, _plan(manifest=_manifest(num_shards=2)).hash, _plan(model="m2").hash}
    assert len(hashes) == 3


def test_resources_are_not_in_the_hash() -> None:
    config = PatchConfig(
        min_actors=2,
        max_actors=7,
        cpus_per_actor=3,
        memory_bytes_per_actor=1,
        stall_seconds=1.0,
        wait_for_resources=True,
        limit=1,
        verify_documents=0,
        gc_older_than_seconds=0.0,
    )
    assert _plan(config).hash == _plan().hash
    assert dataclasses.replace(_plan(), units=()).hash == _plan().hash


def test_a_rule_without_entropies_ignores_model_and_device() -> None:
    rule = PatchRule(kind="space")
    bare = _plan(PatchConfig(rule=rule), model=None)
    assert bare.patching.entropy_model is None
    other = PatchConfig(rule=rule, reset_on_newline=True, dtype="bfloat16", row_bytes=64)
    assert _plan(other, model="m1").hash == bare.hash


def test_the_rule_always_has_a_limit() -> None:
    assert _plan(PatchConfig(rule=PatchRule())).patching.rule.max_patch_length == 512
    assert _plan(PatchConfig(rule=PatchRule(max_patch_length=7))).patching.rule.max_patch_length == 7


def test_differences_name_the_settings() -> None:
    there = _plan().settings
    here = _plan(PatchConfig(rule=PatchRule(threshold=2.0, max_patch_length=512)), model="m2").settings
    assert differences(there, here) == [
        "entropy_model is m1 there, m2 here",
        "rule.threshold is 1.335442066192627 there, 2.0 here",
    ]


def test_missing_model_and_wrong_dataset_are_refused() -> None:
    with pytest.raises(ConfigError, match="needs entropy_model"):
        _plan(model=None)
    patches = dataclasses.replace(_manifest(), kind="patches", patching=_plan().patching)
    with pytest.raises(DataError, match="documents"):
        _plan(manifest=patches)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"min_actors": 0}, "min_actors"),
        ({"min_actors": 3, "max_actors": 2}, "max_actors"),
        ({"cpus_per_actor": 0}, "cpus_per_actor"),
        ({"row_bytes": 0}, "row_bytes"),
        ({"row_group_bytes": 0}, "row_group_bytes"),
        ({"stall_seconds": 0}, "stall_seconds"),
        ({"device": "cuda"}, "gpus_per_actor"),
        ({"gpus_per_actor": 1.0}, "gpus_per_actor"),
        ({"rule": PatchRule(kind="space"), "calibration": "x"}, "calibration"),
        ({"rule": PatchRule(kind="space"), "store_entropies": True}, "store_entropies needs rule.kind"),
        ({"rule": PatchRule(kind="byte"), "reuse_entropies": "x"}, "reuse_entropies needs rule.kind"),
        ({"limit": 0}, "limit"),
        ({"memory_bytes_per_actor": -1}, "memory_bytes_per_actor"),
        ({"verify_documents": -1}, "verify_documents"),
        ({"gc_older_than_seconds": -1.0}, "gc_older_than_seconds"),
    ],
)
def test_bad_values_are_refused_by_name(values: dict[str, object], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        PatchConfig(**values)


@pytest.mark.parametrize(
    "rule",
    [
        PatchRule(threshold=1.34375),
        PatchRule(threshold=-0.03125, monotonic=True, threshold_add=0.1),  # monotonic: threshold_add is not used
        PatchRule(threshold=1.0, threshold_add=0.0),
        PatchRule(kind="top_k", patch_size=4.5),
    ],
)
def test_thresholds_on_the_grid_serve_stored_entropies(rule: PatchRule) -> None:
    stored = _plan(PatchConfig(rule=rule, store_entropies=True)).patching.rule
    assert stored == dataclasses.replace(rule, quantized=True, max_patch_length=512)


def test_thresholds_off_the_grid_are_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"rule\.threshold .* got 1\.34; the nearest are 1\.3125 and 1\.34375"):
        _plan(PatchConfig(rule=PatchRule(threshold=1.34), store_entropies=True))
