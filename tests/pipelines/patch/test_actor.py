"""The patch actor in this process, without Ray: every rule on edge documents, adoption, counts."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from blt.checkpoint import fingerprint
from blt.entropy_model import EntropyModel, document_entropies
from blt.errors import CheckpointError, DataError
from blt.patching import PatchRule, patch_lengths
from blt.vocabulary import BOS, encode
from pipelines.manifest import Manifest, read_manifest, write_manifest
from pipelines.patch.actor import PatchActor, Receipt
from pipelines.patch.plan import PatchConfig, make_plan
from pipelines.schema import unpack_starts
from tests.pipelines.patch.corpus import EDGE_DOCUMENTS, prose, write_documents

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

    def patch(self, output: Path, index: int = 0, model_fingerprint: str | None = None) -> Receipt:
        plan = make_plan(self.config, read_manifest(self.documents), model_fingerprint)
        actor = PatchActor(
            plan=plan, documents=self.documents, output=str(output), entropy_model=self.model, cpus_per_actor=1
        )
        return actor.patch(plan.units[index])


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
    receipt = work.patch(tmp_path / "patches", model_fingerprint=fingerprint(entropy_model))
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
    assert receipt.commit.patches == sum(row["n_patches"] for row in rows)


def test_fixed_patches_count_from_the_first_byte(tmp_path: Path) -> None:
    config = PatchConfig(rule=PatchRule(kind="fixed", patch_size=4))
    receipt = _Work(tmp_path, config).patch(tmp_path / "patches")
    assert receipt.commit.patches == sum(-(-len(text) // 4) for text in TEXTS)


def test_a_receipt_states_the_committed_file(tmp_path: Path) -> None:
    receipt = _Work(tmp_path, SPACE).patch(tmp_path / "patches")
    data = (tmp_path / "patches" / PATH).read_bytes()
    assert receipt.commit.sha256 == hashlib.sha256(data).hexdigest()
    assert (receipt.commit.documents, receipt.commit.bytes) == (len(TEXTS), sum(map(len, TEXTS)))
    commit = json.loads((tmp_path / "patches/_commits/train-00000.json").read_text())
    assert commit == dataclasses.asdict(receipt.commit)
    groups = pq.ParquetFile(tmp_path / "patches" / PATH).metadata
    assert groups.num_row_groups > 2
    assert receipt.stats.seconds > 0


def test_the_same_work_gives_the_same_bytes(tmp_path: Path) -> None:
    work = _Work(tmp_path, SPACE)
    assert work.patch(tmp_path / "one").commit == work.patch(tmp_path / "two").commit
    assert (tmp_path / "one" / PATH).read_bytes() == (tmp_path / "two" / PATH).read_bytes()


def test_a_file_without_a_commit_is_adopted(tmp_path: Path) -> None:
    work = _Work(tmp_path, SPACE)
    first = work.patch(tmp_path / "patches")
    (tmp_path / "patches/_commits/train-00000.json").unlink()
    again = work.patch(tmp_path / "patches")
    assert again.commit == first.commit
    assert again.stats.inferring_seconds == 0


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
    shards = (dataclasses.replace(manifest.shards[0], documents=3), manifest.shards[1])
    counts = {"test": dataclasses.replace(manifest.counts["test"], rows_in=4, rows_out=4)}
    write_manifest(work.documents, Manifest(kind="documents", shards=shards, counts=counts))
    with pytest.raises(DataError, match="2 documents and 12 bytes; the manifest says 3 and 12"):
        work.patch(tmp_path / "patches")
    assert not (tmp_path / "patches" / PATH).exists()


def test_a_model_that_changed_is_refused(tmp_path: Path, entropy_model_directory: str) -> None:
    work = _Work(tmp_path, PatchConfig(rule=ENTROPY), model=entropy_model_directory)
    with pytest.raises(CheckpointError, match="changed while it was in use"):
        work.patch(tmp_path / "patches", model_fingerprint="0" * 64)
