"""`blt bench patch`: one small run through real actors gives every figure; samples and corpora are what they say."""

import json
from pathlib import Path

import pytest

from blt.checkpoint import save_entropy_model
from blt.entropy_model import EntropyModel, EntropyModelConfig
from blt.errors import ConfigError, DataError
from blt.layers import TransformerConfig
from blt.patching import PatchRule
from jobs.bench.actors import PoolRun, UnitClock
from jobs.bench.corpus import sample_texts, write_corpus
from jobs.bench.files import parquet_bytes_per_cpu_second, reader_bytes_per_cpu_second, stored_bytes
from jobs.bench.patch import GOALS, Config, run
from pipelines.manifest import read_manifest
from pipelines.patch.commit import Commit
from pipelines.patch.plan import PatchConfig
from tests.pipelines.train.patched import random_document, write_patches

TEXTS = [random_document(seed, 40 + seed).text for seed in range(100)]


def texts_of(root: Path) -> list[int]:
    return [shard.bytes for shard in read_manifest(str(root)).shards]


def test_a_corpus_is_cut_into_shards_of_equal_bytes(tmp_path: Path) -> None:
    write_corpus(str(tmp_path), TEXTS, 4000, 4)
    sizes = texts_of(tmp_path)
    assert len(sizes) == 4
    assert all(abs(size - 1000) <= 140 for size in sizes)
    assert 4000 <= sum(sizes) <= 4140


def test_a_sample_is_whole_documents_and_the_same_for_a_seed(tmp_path: Path) -> None:
    write_corpus(str(tmp_path), TEXTS, 8000, 20)
    sample = sample_texts(str(tmp_path), 3000, 120, seed=1)
    assert 3000 <= sum(map(len, sample)) <= 3120
    assert set(sample) <= set(TEXTS)
    assert max(map(len, sample)) <= 120
    assert sample == sample_texts(str(tmp_path), 3000, 120, seed=1)
    assert sample != sample_texts(str(tmp_path), 3000, 120, seed=2)
    everything = sample_texts(str(tmp_path), 8000, 200, seed=1)
    assert sorted(everything) == sorted(set(everything))  # in pieces, and no document twice
    with pytest.raises(DataError, match="bytes=9000"):
        sample_texts(str(tmp_path), 9000, 200, seed=1)


def test_speed_is_summed_over_actors_and_leaves_out_their_start() -> None:
    def commit(num_bytes: int) -> Commit:
        return Commit(
            id="", path="", source="", documents=1, bytes=num_bytes, patches=1, size_bytes=1, sha256="", plan=""
        )

    def clock(actor: int, began: float, ended: float) -> UnitClock:
        return UnitClock(actor=actor, began=began, ended=ended, cpu_seconds=0.5, peak_rss_bytes=1)

    pool = PoolRun(
        commits=(commit(100), commit(200), commit(300)),
        units=(clock(1, 10.0, 12.0), clock(2, 14.0, 15.0), clock(1, 13.0, 14.0)),
    )
    assert pool.bytes_per_second == 400 / 4 + 200 / 1
    assert pool.busy_bytes_per_second == 600 / 4
    assert pool.bytes_per_cpu_second == 600 / 1.5


def test_files_are_measured_whole_and_text_alone(tmp_path: Path) -> None:
    root = write_patches(tmp_path, {"train/shard-00000.parquet": [random_document(seed, 3000) for seed in range(9)]})
    stored = stored_bytes(root)
    # Random bytes do not shrink; the patch starts take a bit of each byte, and two small row groups their footers.
    assert 1.0 < stored.text < stored.whole - 0.1
    assert reader_bytes_per_cpu_second(root, verify=True) > 0
    assert parquet_bytes_per_cpu_second(root) > 0


def test_settings_that_measure_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^repeats must be at least 1, got 0"):
        Config(documents="d", entropy_model="m", repeats=0)
    with pytest.raises(ConfigError, match=r"^patch\.rule\.kind"):
        Config(documents="d", entropy_model="m", patch=PatchConfig(rule=PatchRule(kind="space")))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_local")
def test_a_run_gives_every_figure_in_one_line(tmp_path: Path) -> None:
    documents, model = tmp_path / "documents", tmp_path / "model"
    write_corpus(str(documents), TEXTS, 8000, 2)
    shape = TransformerConfig(width=16, layers=1, heads=1, window=32)
    save_entropy_model(EntropyModel(EntropyModelConfig(transformer=shape)), model)
    config = Config(
        documents=str(documents), entropy_model=str(model), bytes=4000, shards=4, repeats=2, memory_bytes=2000
    )
    line = run(config).to_json()
    assert "\n" not in line
    figures = json.loads(line)
    assert figures["status"] == "done"
    assert GOALS.keys() <= figures.keys()
    assert 4000 <= figures["measured_bytes"] <= 4140
    for name in ("pipeline_to_bare", "two_actors_to_one", "open_patches_bytes_per_cpu_second"):
        assert len(figures[name]["repeats"]) == 2
        assert min(figures[name]["repeats"]) > 0
    assert len(figures["actor_peak_rss_bytes_after_each_shard"]) == 4
    assert figures["configuration"]["patch"]["rule"]["kind"] == "entropy"
