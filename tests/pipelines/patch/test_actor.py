"""The patch actor in this process, without Ray: every rule on edge documents, models, adoption, counts, metrics."""

import dataclasses
import errno
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from ray.util.metrics import Counter, Gauge

from blt.checkpoint import fingerprint, save_entropy_model
from blt.entropy_model import EntropyModel, EntropyModelConfig, document_entropies
from blt.errors import CheckpointError, DataError
from blt.interop import from_reference, to_reference
from blt.layers import TransformerConfig
from blt.patching import PatchRule, document_patch_starts, patch_lengths
from blt.vocabulary import BOS, encode
from pipelines.manifest import Manifest, read_manifest, write_manifest
from pipelines.new_file import NewFile
from pipelines.patch.actor import PatchActor, PatchSources
from pipelines.patch.commit import Commit
from pipelines.patch.plan import PatchConfig, make_plan
from pipelines.patch.stats import stats_of
from pipelines.schema import unpack_starts
from pipelines.storage import Storage
from tests.pipelines.patch.corpus import EDGE_DOCUMENTS, prose, write_documents
from tests.s3_server import S3Server

PATH = "train/shard-00000.parquet"
TEXTS = [*EDGE_DOCUMENTS, prose(0, 1500), b"lines\nof\n\ntext\n" * 20]
ENTROPY = PatchRule(threshold=3.0, max_patch_length=64)
SPACE = PatchConfig(rule=PatchRule(kind="space"), row_group_bytes=1500)


class _Work:
    """One shard, a plan for it, and an actor that patches it into `output`."""

    def __init__(
        self, root: Path, config: PatchConfig, texts: Sequence[bytes] = TEXTS, model: str | None = None
    ) -> None:
        self.documents = str(root / "documents")
        if not (root / "documents").exists():
            write_documents(root / "documents", {PATH: texts, "valid/shard-00000.parquet": [b"other"]})
        self.config, self.model = config, model

    def patch(self, output: Path | str, index: int = 0, model_fingerprint: str | None = None) -> Commit:
        plan = make_plan(self.config, read_manifest(self.documents), model_fingerprint)
        sources = PatchSources(
            documents=self.documents,
            output=str(output),
            entropy_model=self.model,
            reuse_entropies=self.config.reuse_entropies,
        )
        return PatchActor(plan=plan, sources=sources, cpus_per_actor=1).patch(plan.units[index])


@pytest.mark.parametrize("reset_on_newline", [False, True])
@pytest.mark.parametrize(
    "rule",
    [
        ENTROPY,
        PatchRule(threshold=0.2, monotonic=True, max_patch_length=64),
        PatchRule(threshold=2.0, threshold_add=0.1, max_patch_length=64),
        PatchRule(kind="top_k", patch_size=4.5, max_patch_length=64),
        PatchRule(kind="space", max_patch_length=64),
        PatchRule(kind="byte", max_patch_length=64),
    ],
)
def test_rows_hold_what_patch_lengths_says(
    tmp_path: Path, entropy_model: EntropyModel, entropy_model_directory: str, rule: PatchRule, reset_on_newline: bool
) -> None:
    config = PatchConfig(rule=rule, reset_on_newline=reset_on_newline, row_bytes=512, row_group_bytes=1500)
    work = _Work(tmp_path, config, model=entropy_model_directory)
    commit = work.patch(tmp_path / "patches", model_fingerprint=fingerprint(entropy_model))
    rows = pq.read_table(tmp_path / "patches" / PATH).to_pylist()
    assert [row["text"] for row in rows] == TEXTS
    entropies = document_entropies(entropy_model, TEXTS, reset_on_newline=reset_on_newline, row_bytes=512)
    for row, text, values in zip(rows, TEXTS, entropies, strict=True):
        ids = torch.cat((torch.tensor([BOS]), encode(text)))
        lengths = patch_lengths(ids, values, rule, include_next=True).numpy()
        borders = np.cumsum(np.concatenate(([0], lengths)))[:-1]
        expected = np.isin(np.arange(1, len(text) + 2), borders)
        assert np.array_equal(unpack_starts(row["patch_starts"], len(text)), expected), text
        assert row["n_patches"] == expected[:-1].sum()
    assert commit.patches == sum(row["n_patches"] for row in rows)


def test_fixed_patches_count_from_the_first_byte(tmp_path: Path) -> None:
    config = PatchConfig(rule=PatchRule(kind="fixed", patch_size=4))
    commit = _Work(tmp_path, config).patch(tmp_path / "patches")
    assert commit.patches == sum(-(-len(text) // 4) for text in TEXTS)


def test_a_commit_states_the_committed_file(tmp_path: Path) -> None:
    commit = _Work(tmp_path, SPACE).patch(tmp_path / "patches")
    data = (tmp_path / "patches" / PATH).read_bytes()
    assert commit.sha256 == hashlib.sha256(data).hexdigest()
    assert (commit.documents, commit.bytes) == (len(TEXTS), sum(map(len, TEXTS)))
    assert commit.size_bytes == len(data)
    record = json.loads((tmp_path / "patches/_commits/train-00000.json").read_text())
    assert record == msgspec.to_builtins(commit)
    groups = pq.ParquetFile(tmp_path / "patches" / PATH).metadata
    assert groups.num_row_groups > 2
    assert commit.seconds.total >= max(commit.seconds.reading, commit.seconds.inferring, commit.seconds.writing) > 0


def test_the_same_work_gives_the_same_bytes(tmp_path: Path) -> None:
    work = _Work(tmp_path, SPACE)
    assert work.patch(tmp_path / "one").agrees_with(work.patch(tmp_path / "two"))
    assert (tmp_path / "one" / PATH).read_bytes() == (tmp_path / "two" / PATH).read_bytes()


def test_a_file_without_a_commit_is_adopted(tmp_path: Path) -> None:
    work = _Work(tmp_path, SPACE)
    first = work.patch(tmp_path / "patches")
    (tmp_path / "patches/_commits/train-00000.json").unlink()
    again = work.patch(tmp_path / "patches")
    assert again.agrees_with(first)
    assert again.seconds.inferring == 0


def test_foreign_and_damaged_files_are_not_adopted(tmp_path: Path) -> None:
    work = _Work(tmp_path, SPACE)
    work.patch(tmp_path / "patches", index=1)
    shard = tmp_path / "patches" / PATH
    shard.parent.mkdir()
    shard.write_bytes((tmp_path / "patches/valid/shard-00000.parquet").read_bytes())
    with pytest.raises(DataError, match=r"train/shard-00000\.parquet was made by other work: .*source_shard"):
        work.patch(tmp_path / "patches")
    work.patch(tmp_path / "good")
    whole = (tmp_path / "good" / PATH).read_bytes()
    shard.write_bytes(whole[:-100])
    with pytest.raises(DataError, match=r"train/shard-00000\.parquet"):
        work.patch(tmp_path / "patches")
    middle = len(whole) // 3
    shard.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    with pytest.raises(DataError, match=r"train/shard-00000\.parquet"):
        work.patch(tmp_path / "patches")
    assert not (tmp_path / "patches/_commits/train-00000.json").exists()


def test_another_rule_does_not_adopt(tmp_path: Path) -> None:
    _Work(tmp_path, SPACE).patch(tmp_path / "patches")
    (tmp_path / "patches/_commits/train-00000.json").unlink()
    other = _Work(tmp_path, PatchConfig(rule=PatchRule(kind="byte")))
    with pytest.raises(DataError, match="made by other work: plan is"):
        other.patch(tmp_path / "patches")


def test_counts_that_differ_from_the_manifest_fail(tmp_path: Path) -> None:
    work = _Work(tmp_path, SPACE, [b"one two", b"three"])
    manifest = read_manifest(work.documents)
    shards = (msgspec.structs.replace(manifest.shards[0], documents=3), manifest.shards[1])
    counts = {"test": dataclasses.replace(manifest.counts["test"], rows_in=4, rows_out=4)}
    write_manifest(work.documents, Manifest(kind="documents", shards=shards, counts=counts))
    with pytest.raises(DataError, match="2 documents and 12 bytes; the manifest says 3 and 12"):
        work.patch(tmp_path / "patches")
    assert not (tmp_path / "patches" / PATH).exists()


def test_a_model_that_changed_is_refused(tmp_path: Path, entropy_model_directory: str) -> None:
    work = _Work(tmp_path, PatchConfig(rule=ENTROPY), model=entropy_model_directory)
    with pytest.raises(CheckpointError, match="changed while it was in use"):
        work.patch(tmp_path / "patches", model_fingerprint="0" * 64)


def test_an_imported_entropy_model_works_as_a_trained_one(tmp_path: Path) -> None:
    """Weights and arguments under the reference's names, brought in and saved as our own."""
    shape = TransformerConfig(width=32, layers=2, heads=4, kv_heads=2, window=16, ffn_multiple_of=16)
    weights = to_reference(EntropyModel(EntropyModelConfig(transformer=shape)))
    arguments = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "sliding_window": 16, "multiple_of": 16}
    imported = from_reference(weights, arguments)
    assert isinstance(imported, EntropyModel)
    save_entropy_model(imported, tmp_path / "model")
    rule = PatchRule(threshold=5.4, max_patch_length=64)
    work = _Work(tmp_path, PatchConfig(rule=rule), model=str(tmp_path / "model"))
    commit = work.patch(tmp_path / "patches", model_fingerprint=fingerprint(imported))
    expected = [
        document_patch_starts(text, values, rule)
        for text, values in zip(TEXTS, document_entropies(imported, TEXTS), strict=True)
    ]
    assert commit.patches == sum(int(starts[:-1].sum()) for starts in expected)


@pytest.mark.s3
def test_model_documents_and_output_on_s3(
    tmp_path: Path, entropy_model: EntropyModel, entropy_model_directory: str, s3: S3Server
) -> None:
    work = _Work(tmp_path, PatchConfig(rule=ENTROPY), model=entropy_model_directory)
    local = work.patch(tmp_path / "patches", model_fingerprint=fingerprint(entropy_model))
    for prefix, root in (("documents", work.documents), ("model", entropy_model_directory)):
        remote = Storage(s3.url(f"patch-actor/{prefix}"))
        for path in Storage(root).list():
            remote.write_replace(path, Storage(root).read_bytes(path))
    work.documents, work.model = s3.url("patch-actor/documents"), s3.url("patch-actor/model")
    output = s3.url("patch-actor/patches")
    assert work.patch(output, model_fingerprint=fingerprint(entropy_model)).agrees_with(local)
    assert Storage(output).sha256(PATH) == local.sha256
    Storage(output).delete("_commits/train-00000.json")
    assert work.patch(output, model_fingerprint=fingerprint(entropy_model)).agrees_with(local)  # adopted


def test_metrics_are_the_figures_of_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: dict[str, float] = {}
    gauged: dict[str, float] = {}
    monkeypatch.setattr(Counter, "inc", lambda metric, value, tags: counted.update({metric.info["name"]: value}))
    monkeypatch.setattr(
        Gauge, "set", lambda metric, value, tags: gauged.update({f"{metric.info['name']} {tags}": value})
    )
    figures = stats_of(_Work(tmp_path, SPACE).patch(tmp_path / "patches")).figures
    names = ("documents", "bytes", "patches", "reading_seconds", "inferring_seconds", "writing_seconds")
    assert counted == {f"blt_patch_{name}": figures[name] for name in names}
    assert gauged == {"blt_patch_actor_bytes_per_second {'source': 'test'}": figures["actor_bytes_per_second"]}


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fills while a row group is written."""

    def full(file: NewFile, data: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    work = _Work(tmp_path, SPACE)
    with monkeypatch.context() as patched:
        patched.setattr(NewFile, "write", full)
        with pytest.raises(OSError, match="No space left on device"):
            work.patch(tmp_path / "patches")
    assert Storage(str(tmp_path / "patches")).list() == []
    assert Storage(str(tmp_path / "patches")).leftovers(0) == []
    assert work.patch(tmp_path / "patches").documents == len(TEXTS)
