"""Manifests: read back as written, refused when broken or when their numbers do not add up."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blt.errors import DataError
from blt.patching import PatchRule
from pipelines.manifest import Manifest, Patching, ShardEntry, SourceCounts, is_inside, read_manifest, write_manifest


def _manifest(**changes: Any) -> Manifest:
    shard = ShardEntry(
        path="train/shard-0.parquet", split="train", source="s", documents=2, bytes=30, patches=7, sha256="ab"
    )
    held_out = ShardEntry(
        path="valid/shard-0.parquet", split="valid", source="s", documents=1, bytes=10, patches=2, sha256="cd"
    )
    values: dict[str, Any] = {
        "kind": "patches",
        "shards": (shard, held_out),
        "counts": {"s": SourceCounts(rows_in=7, rows_out=3, quarantined=1, filtered=1, duplicates=2, bytes=40)},
        "patching": Patching(
            entropy_model="f0", rule=PatchRule(threshold=1.25), reset_on_newline=True, dtype="float32", device="cpu"
        ),
    }
    return Manifest(**(values | changes))


def test_manifest_is_read_back_as_written(tmp_path: Path) -> None:
    write_manifest(str(tmp_path), _manifest())
    manifest = read_manifest(str(tmp_path))
    assert manifest == _manifest()
    assert manifest.fingerprint == _manifest().fingerprint
    assert [shard.path for shard in manifest.split("valid")] == ["valid/shard-0.parquet"]
    assert (manifest.documents, manifest.bytes) == (3, 40)


def test_fingerprint_follows_every_field() -> None:
    manifest = _manifest()
    assert manifest.patching is not None
    nothing = SourceCounts(rows_in=1, rows_out=0, quarantined=1, filtered=0, bytes=0)
    others = [
        _manifest(patching=dataclasses.replace(manifest.patching, rule=PatchRule(threshold=1.26))),
        _manifest(shards=(manifest.shards[0], msgspec.structs.replace(manifest.shards[1], sha256="ce"))),
        _manifest(counts=manifest.counts | {"t": nothing}),
        _manifest(entropies=True),
    ]
    assert len({m.fingerprint for m in [manifest, *others]}) == 5


def test_licences_are_read_back_and_no_part_of_the_fingerprint(tmp_path: Path) -> None:
    named = _manifest(licenses={"s": "public domain"})
    write_manifest(str(tmp_path), named)
    assert read_manifest(str(tmp_path)) == named
    assert named.fingerprint == _manifest().fingerprint
    without = json.loads((tmp_path / "manifest.json").read_text())
    del without["licenses"]  # as datasets have it that are older than the key
    (tmp_path / "manifest.json").write_text(json.dumps(without))
    assert read_manifest(str(tmp_path)) == _manifest()


def test_counts_that_do_not_reconcile_are_refused() -> None:
    with pytest.raises(DataError, match="reconcile"):
        SourceCounts(rows_in=5, rows_out=3, quarantined=1, filtered=0, bytes=40)
    with pytest.raises(DataError, match="reconcile"):
        SourceCounts(rows_in=0, rows_out=1, quarantined=0, filtered=-1, bytes=0)
    with pytest.raises(DataError, match="reconcile"):
        _manifest(counts={"s": SourceCounts(rows_in=2, rows_out=2, quarantined=0, filtered=0, bytes=40)})
    with pytest.raises(DataError, match="source 's'"):  # the sum is right, the sources are not
        _manifest(counts={"t": SourceCounts(rows_in=3, rows_out=3, quarantined=0, filtered=0, bytes=40)})
    with pytest.raises(DataError, match="patching"):
        _manifest(kind="documents")


def test_counts_add_up() -> None:
    one = SourceCounts(rows_in=4, rows_out=1, quarantined=1, filtered=1, duplicates=1, bytes=9)
    assert one + one == SourceCounts(rows_in=8, rows_out=2, quarantined=2, filtered=2, duplicates=2, bytes=18)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "not a finished dataset"),
        (lambda text: text[:-20], "cannot read"),
        (lambda text: "[]", "cannot read"),
        (lambda text: text.replace('"train"', '"test"', 1), "cannot read"),
        (lambda text: text.replace('"rows_in": 7', '"rows_in": 6'), "reconcile"),
        (lambda text: text.replace('"bytes": 30', '"bytes": 31'), "reconcile"),
        (lambda text: text.replace('"schema_version": 2', '"schema_version": 99'), "schema version 99"),
        (lambda text: text.replace('"entropy"', '"nonsense"'), "nonsense"),
    ],
)
def test_broken_manifest_is_one_clear_line(tmp_path: Path, change: Any, message: str) -> None:
    file = tmp_path / "manifest.json"
    if change is not None:
        write_manifest(str(tmp_path), _manifest())
        file.write_text(change(file.read_text()))
    with pytest.raises(DataError, match=message) as error:
        read_manifest(str(tmp_path))
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_manifest_is_plain_json(tmp_path: Path) -> None:
    write_manifest(str(tmp_path), _manifest())
    record = json.loads((tmp_path / "manifest.json").read_text())
    assert record["counts"]["s"]["quarantined"] == 1
    assert record["patching"]["rule"]["threshold"] == 1.25


@pytest.mark.parametrize(
    "path",
    ["../secret", "train/../../secret", "/etc/passwd", "train//x", "./x", "", "train/x/..", "a\\..\\b", "a\0b", "a\nb"],
)
def test_a_shard_outside_the_dataset_is_refused(path: str, tmp_path: Path) -> None:
    """In a manifest as it is made, and in one that somebody else has written: nothing outside is read or made."""
    shard = msgspec.structs.replace(_manifest().shards[0], path=path)
    with pytest.raises(DataError, match="does not lie inside its dataset"):
        _manifest(shards=(shard, _manifest().shards[1]))
    root = tmp_path / "dataset"
    root.mkdir()
    write_manifest(str(root), _manifest())
    text = json.loads((root / "manifest.json").read_text())
    text["shards"][0]["path"] = path
    (root / "manifest.json").write_text(json.dumps(text))
    with pytest.raises(DataError, match="does not lie inside its dataset"):
        read_manifest(str(root))


@given(st.text(alphabet="a./\\ ", max_size=12))
def test_what_is_inside_stays_below_any_root(path: str) -> None:
    inside = os.path.normpath(f"/root/{path}").startswith("/root/") and not path.startswith("/")
    assert not is_inside(path) or inside
