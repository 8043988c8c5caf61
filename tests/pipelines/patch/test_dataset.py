"""The patch dataset on a local Ray: complete, exact, done once, and refused where it does not fit."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import ANY

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from blt.checkpoint import fingerprint
from blt.entropy_model import EntropyModel, document_entropies
from blt.errors import CheckpointError, ConfigError, DataError
from blt.patching import PatchRule, patch_lengths
from blt.vocabulary import BOS, encode
from pipelines.manifest import read_manifest, write_manifest
from pipelines.patch import PatchConfig, patch_dataset
from pipelines.patch.calibration import Calibration, write_calibration
from pipelines.patch.commit import Commit, read_commits, read_plan, record
from pipelines.schema import unpack_starts
from pipelines.storage import Storage
from tests.metrics_page import wait_for_figures
from tests.pipelines.patch.corpus import EDGE_DOCUMENTS, prose, write_documents
from tests.pipelines.patch.in_process import use_in_process_pool

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_local")]

RULE = PatchRule(threshold=4.0, max_patch_length=64)
CONFIG = PatchConfig(rule=RULE, max_actors=2, row_bytes=512, row_group_bytes=2000)


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Four training shards and one of validation: edge cases, prose, one empty shard."""
    shards = {
        "train/shard-00000.parquet": EDGE_DOCUMENTS,
        "train/shard-00001.parquet": [prose(1, 3000), prose(2, 200), *EDGE_DOCUMENTS[:4]],
        "train/shard-00002.parquet": [prose(seed, 300) for seed in range(10)],
        "train/shard-00003.parquet": [],
        "valid/shard-00000.parquet": [prose(99, 2500), b""],
    }
    return write_documents(tmp_path_factory.mktemp("patch") / "documents", shards)


@pytest.fixture(scope="module")
def patched(documents: str, entropy_model_directory: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete dataset that no test changes."""
    output = tmp_path_factory.mktemp("patched") / "patches"
    patch_dataset(CONFIG, documents, entropy_model_directory, str(output))
    return output


def _data_files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*.parquet"))}


def _commits(root: Path) -> dict[str, Commit]:
    """All records, which must be in parts by now."""
    plan_hash, _ = read_plan(Storage(str(root)))
    done = read_commits(Storage(str(root)), plan_hash)
    assert done.ungathered == ()
    return done.commits


def _scatter(root: Path) -> None:
    """Put the records back into files of their own, as a driver leaves them that is killed before it gathers them."""
    commits = _commits(root)
    for part in (root / "_commits").iterdir():
        part.unlink()
    for commit in commits.values():
        record(Storage(str(root)), commit)


def _rows(root: Path) -> Iterator[dict[str, object]]:
    for path in sorted(root.rglob("*.parquet")):
        yield from pq.read_table(path).to_pylist()


def test_every_document_has_its_patches(patched: Path, documents: str, entropy_model: EntropyModel) -> None:
    texts = [row["text"] for row in _rows(Path(documents))]
    rows = list(_rows(patched))
    assert [row["text"] for row in rows] == texts
    entropies = document_entropies(entropy_model, texts)
    counts = set()
    for row, text, values in zip(rows, texts, entropies, strict=True):
        ids = torch.cat((torch.tensor([BOS]), encode(text)))
        lengths = patch_lengths(ids, values, RULE, include_next=True)
        starts = np.zeros(len(text) + 2, dtype=bool)
        starts[np.cumsum(np.concatenate(([0], lengths.numpy())))[:-1]] = True
        assert np.array_equal(unpack_starts(row["patch_starts"], len(text)), starts[1:]), text
        assert row["n_patches"] == starts[1:-1].sum()
        counts.add(row["n_patches"])
    assert len(counts) > 5, "the rule should cut in many ways"


def test_licences_are_those_of_the_documents(
    documents: str, entropy_model_directory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_in_process_pool(monkeypatch)
    shutil.copytree(documents.removeprefix("file://"), tmp_path / "documents")
    manifest = dataclasses.replace(read_manifest(documents), licenses={"test": "public domain"})
    write_manifest(str(tmp_path / "documents"), manifest)
    found = patch_dataset(CONFIG, str(tmp_path / "documents"), entropy_model_directory, str(tmp_path / "patches"))
    assert found is not None
    assert found.licenses == read_manifest(str(tmp_path / "patches")).licenses == {"test": "public domain"}


def test_counts_reconcile(patched: Path, documents: str, entropy_model: EntropyModel) -> None:
    source, manifest = read_manifest(documents), read_manifest(str(patched))
    assert manifest.kind == "patches"
    assert [(s.path, s.split, s.documents, s.bytes) for s in manifest.shards] == [
        (s.path, s.split, s.documents, s.bytes) for s in source.shards
    ]
    assert manifest.counts == source.counts
    assert manifest.patching is not None
    assert manifest.patching.entropy_model == fingerprint(entropy_model)
    assert manifest.patching.rule == RULE
    for shard in manifest.shards:
        data = (patched / shard.path).read_bytes()
        assert hashlib.sha256(data).hexdigest() == shard.sha256
        assert pq.read_table(patched / shard.path)["n_patches"].to_numpy().sum() == shard.patches


def test_footer_and_stats(patched: Path, documents: str) -> None:
    footer = pq.ParquetFile(patched / "valid/shard-00000.parquet").metadata.metadata
    plan = json.loads((patched / "_plan.json").read_text())
    assert footer[b"plan"].decode() == plan["hash"]
    assert footer[b"documents_fingerprint"].decode() == read_manifest(documents).fingerprint
    assert json.loads(footer[b"rule"]) == dataclasses.asdict(RULE)
    assert footer[b"source_shard"] == b"valid/shard-00000.parquet"
    assert (footer[b"documents"], footer[b"bytes"]) == (b"2", b"2500")
    assert set(footer) >= {b"schema_version", b"entropy_model", b"dtype", b"device", b"content_sha256", b"patches"}
    stats = json.loads((patched / "stats.json").read_text())
    manifest = read_manifest(str(patched))
    assert stats["total"]["documents"] == manifest.documents
    assert stats["total"]["bytes"] == manifest.bytes
    assert stats["total"]["patches"] == sum(shard.patches or 0 for shard in manifest.shards)
    assert stats["shards"]["train-00001"]["inferring_seconds"] > 0
    assert stats["sources"] == {"test": stats["total"]}
    shares = [stats["total"][f"{stage}_share"] for stage in ("reading", "inferring", "writing")]
    assert sum(shares) == pytest.approx(1)
    assert set(stats["shards"]) == {"train-00000", "train-00001", "train-00002", "train-00003", "valid-00000"}
    assert not (patched / "_temporary").exists()


def test_a_second_run_does_nothing(patched: Path, documents: str, entropy_model_directory: str) -> None:
    before = {path: path.stat().st_mtime_ns for path in patched.rglob("*") if path.is_file()}
    progress: list[int] = []
    config = dataclasses.replace(CONFIG, max_actors=1)  # resources may change between runs
    manifest = patch_dataset(config, documents, entropy_model_directory, str(patched), progress.append)
    assert manifest is not None
    assert manifest == read_manifest(str(patched))
    assert progress == [manifest.bytes]
    assert {path: path.stat().st_mtime_ns for path in patched.rglob("*") if path.is_file()} == before


def test_missing_shards_are_done_again_byte_for_byte(
    patched: Path, documents: str, entropy_model_directory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_in_process_pool(monkeypatch)
    output = tmp_path / "patches"
    patch_dataset(CONFIG, documents, entropy_model_directory, str(output))
    assert _data_files(output) == _data_files(patched)
    _scatter(output)
    for lost in ("train/shard-00001.parquet", "_commits/train-00001.json", "_commits/train-00000.json"):
        (output / lost).unlink()  # one shard lost, one whose worker was killed before its commit
    (output / "valid/shard-00000.parquet").unlink()  # and one whose commit outlived its data
    kept = (output / "train/shard-00000.parquet").stat().st_mtime_ns
    progress: list[int] = []
    manifest = patch_dataset(CONFIG, documents, entropy_model_directory, str(output), progress.append)
    assert manifest is not None
    assert len(progress) == 4
    assert sum(progress) == manifest.bytes
    assert manifest == read_manifest(str(patched))
    assert _data_files(output) == _data_files(patched)
    assert (output / "train/shard-00000.parquet").stat().st_mtime_ns == kept
    again, before = _commits(output), _commits(patched)
    assert again.keys() == before.keys()
    assert all(again[id].agrees_with(commit) for id, commit in before.items())


def test_another_plan_is_refused_and_named(patched: Path, documents: str, entropy_model_directory: str) -> None:
    before = _data_files(patched)
    config = dataclasses.replace(CONFIG, rule=dataclasses.replace(RULE, threshold=3.0))
    with pytest.raises(ConfigError, match=r"rule.threshold is 4.0 there, 3.0 here"):
        patch_dataset(config, documents, entropy_model_directory, str(patched))
    assert _data_files(patched) == before


def test_a_calibration_supplies_the_threshold(
    documents: str, entropy_model: EntropyModel, entropy_model_directory: str, patched: Path, tmp_path: Path
) -> None:
    calibration = Calibration(
        threshold=RULE.threshold,
        mean_patch_bytes=4.5,
        target_mean_patch_bytes=4.5,
        rule=RULE,
        reset_on_newline=False,
        entropy_model=fingerprint(entropy_model),
        documents="x",
        sample_documents=1,
        sample_bytes=1,
        seed=0,
        dtype="float32",
        device="cpu",
        table=(),
    )
    write_calibration(str(tmp_path), calibration)
    rule = dataclasses.replace(RULE, threshold=9.0)
    config = dataclasses.replace(CONFIG, rule=rule, calibration=str(tmp_path / "calibration.json"))
    manifest = patch_dataset(config, documents, entropy_model_directory, str(patched))
    assert manifest == read_manifest(str(patched))
    with pytest.raises(ConfigError, match="calibrate again"):
        patch_dataset(
            dataclasses.replace(config, reset_on_newline=True), documents, entropy_model_directory, str(patched)
        )
    write_calibration(str(tmp_path), dataclasses.replace(calibration, entropy_model="another"))
    with pytest.raises(ConfigError, match="was made with entropy model another"):
        patch_dataset(config, documents, entropy_model_directory, str(patched))


def test_what_does_not_fit_is_named_and_leaves_no_manifest(
    documents: str, entropy_model_directory: str, tmp_path: Path
) -> None:
    output = str(tmp_path / "patches")
    with pytest.raises(ConfigError, match="needs entropy_model"):
        patch_dataset(CONFIG, documents, None, output)
    with pytest.raises(CheckpointError, match="nowhere"):
        patch_dataset(CONFIG, documents, str(tmp_path / "nowhere"), output)
    with pytest.raises(DataError, match="nothing"):
        patch_dataset(CONFIG, str(tmp_path / "nothing"), entropy_model_directory, output)
    with pytest.raises(ConfigError, match="cpus_per_actor=64"):
        patch_dataset(dataclasses.replace(CONFIG, cpus_per_actor=64), documents, entropy_model_directory, output)
    assert not Path(output, "manifest.json").exists()


def test_an_error_in_an_actor_reaches_the_driver_as_it_is(tmp_path: Path) -> None:
    root = write_documents(tmp_path / "documents", {"train/shard-00000.parquet": [b"one two", b"three"]})
    Path(root, "train/shard-00000.parquet").write_bytes(b"PAR1 torn")
    config = PatchConfig(rule=PatchRule(kind="space"))
    with pytest.raises(DataError, match=r"shard-00000\.parquet") as raised:
        patch_dataset(config, root, None, str(tmp_path / "patches"))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "patches/manifest.json").exists()
    write_documents(tmp_path / "mended", {"train/shard-00000.parquet": [b"one two", b"three"]})
    manifest = patch_dataset(config, str(tmp_path / "mended"), None, str(tmp_path / "patches"))
    assert manifest is not None
    assert manifest.documents == 2


@pytest.mark.timeout(200)
def test_the_figures_are_on_the_metrics_page_of_ray(tmp_path: Path) -> None:
    shards = {f"train/shard-{i:05d}.parquet": [prose(i, 3000)] for i in range(3)}
    root = write_documents(tmp_path / "documents", shards, sources=dict.fromkeys(shards, "scraped"))
    manifest = patch_dataset(PatchConfig(rule=PatchRule(kind="space")), root, None, str(tmp_path / "patches"))
    assert manifest is not None
    patches = sum(shard.patches or 0 for shard in manifest.shards)
    wanted = {"documents_total": manifest.documents, "bytes_total": manifest.bytes, "patches_total": patches}
    wanted |= {f"{stage}_seconds_total": ANY for stage in ("reading", "inferring", "writing")}
    wanted["actor_bytes_per_second"] = ANY
    assert wait_for_figures(_scraped, wanted).keys() == wanted.keys()


def _scraped(page: str) -> dict[str, float]:
    """Sums over actors of the patch metrics of the source, by name."""
    sums: dict[str, float] = {}
    for line in page.splitlines():
        if line.startswith("ray_blt_patch_") and 'source="scraped"' in line:
            name = line.partition("{")[0].removeprefix("ray_blt_patch_")
            sums[name] = sums.get(name, 0.0) + float(line.rpartition(" ")[2])
    return sums
