"""Commit records: gathered into parts, read with few calls, equal where they are there twice, never of another plan."""

import collections
import json
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from blt.errors import ConfigError, DataError
from blt.patching import PatchRule
from pipelines.manifest import Manifest, ShardEntry, SourceCounts, read_manifest, write_manifest
from pipelines.patch.commit import COMMITS, Commit, claim, gather, is_claimed, read_commits, record
from pipelines.patch.dataset import patch_dataset
from pipelines.patch.plan import PatchConfig, PatchPlan, make_plan
from pipelines.patch.stages import StageSeconds
from pipelines.storage import Storage

CONFIG = PatchConfig(rule=PatchRule(kind="space"))


def _documents(num_shards: int) -> Manifest:
    shards = tuple(
        ShardEntry(path=f"train/shard-{i:05d}.parquet", split="train", source="s", documents=1, bytes=4, sha256="d")
        for i in range(num_shards)
    )
    counts = SourceCounts(rows_in=num_shards, rows_out=num_shards, quarantined=0, filtered=0, bytes=4 * num_shards)
    return Manifest(kind="documents", shards=shards, counts={"s": counts})


def _commits(plan: PatchPlan) -> list[Commit]:
    return [
        Commit(
            id=unit.id,
            path=unit.path,
            source=unit.source,
            documents=unit.documents,
            bytes=unit.bytes,
            patches=2,
            size_bytes=3,
            sha256="x",
            plan=plan.hash,
            seconds=StageSeconds(reading=0.5, total=1.0),
        )
        for unit in plan.units
    ]


@pytest.fixture
def plan() -> PatchPlan:
    return make_plan(CONFIG, _documents(5), None)


@pytest.fixture
def storage(tmp_path: Path, plan: PatchPlan) -> Storage:
    """Five data files with a record each."""
    storage = Storage(str(tmp_path / "patches"))
    claim(storage, plan)
    for commit in _commits(plan):
        storage.write_exclusive(commit.path, b"abc")
        record(storage, commit)
    return storage


def test_gathering_keeps_every_record(storage: Storage, plan: PatchPlan) -> None:
    before = read_commits(storage, plan.hash)
    assert len(before.ungathered) == 5
    gather(storage, before.ungathered[:3])
    gather(storage, [])
    after = read_commits(storage, plan.hash)
    assert after.commits == before.commits
    assert after.commits["train-00000"].seconds == StageSeconds(reading=0.5, total=1.0)
    assert [commit.id for commit in after.ungathered] == ["train-00003", "train-00004"]
    gather(storage, after.ungathered)
    assert read_commits(storage, plan.hash).ungathered == ()
    assert len(storage.list(COMMITS)) == 2


def test_two_drivers_that_gather_the_same_leave_equal_records(storage: Storage, plan: PatchPlan) -> None:
    commits = _commits(plan)
    gather(storage, commits[:4])
    gather(storage, commits[1:])  # the other driver listed before the first one removed anything
    gather(storage, commits[1:])
    record(storage, commits[2])  # and an actor of it came late
    assert read_commits(storage, plan.hash).commits == {commit.id: commit for commit in commits}


def test_a_shard_is_done_when_its_whole_file_is_there(storage: Storage, plan: PatchPlan) -> None:
    storage.delete("train/shard-00001.parquet")
    storage.write_replace("train/shard-00002.parquet", b"longer")
    assert sorted(read_commits(storage, plan.hash).commits) == ["train-00000", "train-00003", "train-00004"]


def test_a_record_that_is_gathered_after_the_listing_is_found_again(
    storage: Storage, plan: PatchPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, listings = Storage.sizes, []

    def listed_then_gathered(self: Storage, prefix: str = "") -> dict[str, int]:
        found = sizes(self, prefix)
        listings.append(len(found))
        if len(listings) == 1:
            gather(storage, _commits(plan))
        return found

    monkeypatch.setattr(Storage, "sizes", listed_then_gathered)
    assert len(read_commits(storage, plan.hash).commits) == 5
    assert len(listings) == 2


def test_records_that_contradict_each_other_are_refused(storage: Storage, plan: PatchPlan) -> None:
    commit = _commits(plan)[0]
    record(storage, msgspec.structs.replace(commit, seconds=StageSeconds()))  # seconds are not compared
    with pytest.raises(DataError, match=r"train-00000\.json does not describe .*shard-00000\.parquet"):
        record(storage, msgspec.structs.replace(commit, sha256="y"))
    gather(storage, [msgspec.structs.replace(commit, sha256="y")])
    record(storage, commit)
    with pytest.raises(DataError, match="two commits of train-00000"):
        read_commits(storage, plan.hash)


def test_broken_and_foreign_records_are_named(storage: Storage, plan: PatchPlan) -> None:
    with pytest.raises(DataError, match="belongs to another plan"):
        read_commits(storage, "0" * 64)
    storage.write_replace(f"{COMMITS}/train-00003.json", b"{")
    with pytest.raises(DataError, match=r"train-00003\.json is broken"):
        read_commits(storage, plan.hash)


def test_another_plan_is_refused(storage: Storage, plan: PatchPlan, tmp_path: Path) -> None:
    other = make_plan(PatchConfig(rule=PatchRule(kind="byte")), _documents(5), None)
    assert is_claimed(storage, plan)
    with pytest.raises(ConfigError, match=r"rule\.kind is space there, byte here"):
        is_claimed(storage, other)
    begun = Storage(str(tmp_path / "begun"))
    assert not is_claimed(begun, plan)
    claim(begun, plan)
    with pytest.raises(ConfigError, match=r"rule\.kind is space there, byte here"):
        claim(begun, other)  # nothing is done, but its driver may be about to
    assert is_claimed(begun, plan)


class _CountedCalls:
    """Counts the calls of Storage that are round trips on object storage."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: collections.Counter[str] = collections.Counter()
        for name in ("exists", "sizes", "open", "read_bytes", "create", "write_exclusive", "write_replace", "delete"):
            monkeypatch.setattr(Storage, name, self._counted(name, getattr(Storage, name)))

    def _counted(self, name: str, method: Any) -> Any:
        def call(storage: Storage, *args: Any) -> Any:
            self.calls[name] += 1
            return method(storage, *args)

        return call


def test_a_finished_dataset_is_found_finished_with_a_handful_of_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1,000 shards: one listing, and reads of the documents' manifest, the plan and one part."""
    write_manifest(str(tmp_path / "documents"), _documents(1000))
    plan = make_plan(CONFIG, read_manifest(str(tmp_path / "documents")), None)
    storage = Storage(str(tmp_path / "patches"))
    claim(storage, plan)
    for unit in plan.units:
        file = tmp_path / "patches" / unit.path
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"abc")
    gather(storage, _commits(plan))
    made = patch_dataset(CONFIG, str(tmp_path / "documents"), None, str(tmp_path / "patches"))
    assert made is not None
    counted, began = _CountedCalls(monkeypatch), time.perf_counter()
    assert patch_dataset(CONFIG, str(tmp_path / "documents"), None, str(tmp_path / "patches")) == made
    assert time.perf_counter() - began < 5
    assert counted.calls == {"sizes": 1, "read_bytes": 3, "write_exclusive": 1}
    assert json.loads((tmp_path / "patches/stats.json").read_text())["total"]["seconds"] == 1000
