"""Stored entropies and their use under another rule: the same bytes as a fresh run, no inference, clear refusals."""

import dataclasses
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from blt.checkpoint import save_entropy_model
from blt.entropy_model import EntropyModel, document_entropies
from blt.errors import ConfigError, DataError
from blt.patching import PatchRule, document_patch_starts
from pipelines.manifest import Manifest, read_manifest, write_manifest
from pipelines.patch import PatchConfig, patch_dataset
from pipelines.schema import ENTROPY_FIELD, unpack_starts
from tests.pipelines.patch.corpus import EDGE_DOCUMENTS, prose, write_documents
from tests.pipelines.patch.in_process import use_in_process_pool

RULE = PatchRule(threshold=4.0, max_patch_length=64)
CONFIG = PatchConfig(rule=RULE, row_bytes=512, row_group_bytes=3000, store_entropies=True)
SHARDS = {
    "train/shard-00000.parquet": [*EDGE_DOCUMENTS, prose(0, 1500)],
    "train/shard-00001.parquet": [prose(1, 700), prose(2, 200), *EDGE_DOCUMENTS[:4]],
    "train/shard-00002.parquet": [],
}


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_documents(tmp_path_factory.mktemp("reuse") / "documents", SHARDS)


@pytest.fixture(scope="module")
def stored(documents: str, entropy_model_directory: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dataset that stores its entropies; no test changes it."""
    output = str(tmp_path_factory.mktemp("stored") / "patches")
    with pytest.MonkeyPatch.context() as patched:
        use_in_process_pool(patched)
        patch_dataset(CONFIG, documents, entropy_model_directory, output)
    return output


@pytest.fixture(autouse=True)
def _pool(monkeypatch: pytest.MonkeyPatch) -> None:
    use_in_process_pool(monkeypatch)


def _no_model(*_: object) -> EntropyModel:
    raise AssertionError("a model was loaded")


def _data_files(root: str) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(Path(root).rglob("*.parquet"))}


def test_entropies_are_stored_rounded_up_and_decide(stored: str, entropy_model: EntropyModel) -> None:
    manifest = read_manifest(stored)
    assert manifest.entropies
    assert manifest.patching is not None
    assert manifest.patching.rule == dataclasses.replace(RULE, quantized=True)
    for path, texts in SHARDS.items():
        rows = pq.read_table(Path(stored, path)).to_pylist()
        for row, values in zip(rows, document_entropies(entropy_model, texts), strict=True):
            assert list(row["entropies"]) == torch.ceil(values * 32).int().tolist()
            starts = document_patch_starts(row["text"], values, RULE).numpy()  # on the grid, unrounded values agree
            assert (unpack_starts(row["patch_starts"], row["n_bytes"]) == starts).all()


@pytest.mark.parametrize(
    "rule",
    [
        PatchRule(threshold=3.5, max_patch_length=32),
        PatchRule(threshold=0.25, monotonic=True, max_patch_length=64),
        PatchRule(threshold=2.0, threshold_add=0.125, max_patch_length=64),
        PatchRule(kind="top_k", patch_size=4.5, max_patch_length=64),
    ],
)
def test_another_rule_gives_the_bytes_of_a_fresh_run(
    stored: str,
    documents: str,
    entropy_model_directory: str,
    tmp_path: Path,
    rule: PatchRule,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Row groups are cut in another way than in the dataset whose entropies are read."""
    config = dataclasses.replace(CONFIG, rule=rule, row_group_bytes=1000)
    fresh = patch_dataset(config, documents, entropy_model_directory, str(tmp_path / "fresh"))
    monkeypatch.setattr("pipelines.patch.actor.load_model", _no_model)
    reusing = dataclasses.replace(config, reuse_entropies=stored, row_bytes=8192, dtype="bfloat16")  # inherited
    assert patch_dataset(reusing, documents, None, str(tmp_path / "again")) == fresh
    assert _data_files(str(tmp_path / "again")) == _data_files(str(tmp_path / "fresh")) != _data_files(stored)


def test_entropies_need_not_be_stored_again(stored: str, documents: str, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, reuse_entropies=stored, store_entropies=False)
    manifest = patch_dataset(config, documents, None, str(tmp_path / "patches"))
    assert manifest is not None
    assert not manifest.entropies
    for path in SHARDS:
        table = pq.read_table(tmp_path / "patches" / path)
        assert ENTROPY_FIELD.name not in table.column_names
        assert table.equals(pq.read_table(Path(stored, path)).drop_columns([ENTROPY_FIELD.name]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reset_on_newline": True}, "reset_on_newline is True, .* were made with False; set it to false"),
        ({"rule": PatchRule(threshold=1.34)}, r"rule\.threshold .* got 1\.34; the nearest are 1\.3125 and 1\.34375"),
        (
            {"rule": PatchRule(threshold=1.0, threshold_add=0.1)},
            r"rule\.threshold_add .*; the nearest are 0\.09375 and 0\.125",
        ),
    ],
)
def test_settings_that_stored_entropies_cannot_serve(
    stored: str, documents: str, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    config = dataclasses.replace(CONFIG, reuse_entropies=stored, **changes)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message):
        patch_dataset(config, documents, None, str(tmp_path / "patches"))


def test_datasets_that_cannot_serve(
    stored: str, documents: str, entropy_model: EntropyModel, entropy_model_directory: str, tmp_path: Path
) -> None:
    output = str(tmp_path / "patches")
    config = dataclasses.replace(CONFIG, reuse_entropies=stored)
    others = write_documents(tmp_path / "others", {"train/shard-00000.parquet": [b"others"]})
    with pytest.raises(ConfigError, match="was made from documents"):
        patch_dataset(config, others, None, output)
    changed = EntropyModel(entropy_model.config)
    save_entropy_model(changed, tmp_path / "model")
    with pytest.raises(ConfigError, match=r"was made with entropy model .*; leave one of the two out"):
        patch_dataset(config, documents, str(tmp_path / "model"), output)
    bare = str(tmp_path / "bare")
    patch_dataset(dataclasses.replace(CONFIG, store_entropies=False), documents, entropy_model_directory, bare)
    with pytest.raises(ConfigError, match="stores no entropies; patch with store_entropies=true once"):
        patch_dataset(dataclasses.replace(CONFIG, reuse_entropies=bare), documents, None, output)


def test_rows_that_are_not_the_documents_are_refused(stored: str, documents: str, tmp_path: Path) -> None:
    """A dataset that was put together by hand: the shards of another corpus under the plan of this one."""
    mixed = tmp_path / "mixed"
    for path in Path(stored).rglob("*"):
        if path.is_file():
            copy = mixed / path.relative_to(stored)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    Path(mixed, "train/shard-00000.parquet").write_bytes(Path(stored, "train/shard-00001.parquet").read_bytes())
    config = dataclasses.replace(CONFIG, reuse_entropies=str(mixed))
    with pytest.raises(DataError, match=r"mixed/train/shard-00000\.parquet does not hold the documents"):
        patch_dataset(config, documents, None, str(tmp_path / "patches"))
    assert not (tmp_path / "patches/train").exists()


def test_a_lost_plan_is_named(stored: str, documents: str, tmp_path: Path) -> None:
    manifest: Manifest = read_manifest(stored)
    write_manifest(str(tmp_path / "bare"), manifest)
    with pytest.raises(DataError, match=r"has lost its _plan\.json"):
        patch_dataset(
            dataclasses.replace(CONFIG, reuse_entropies=str(tmp_path / "bare")), documents, None, str(tmp_path / "out")
        )
