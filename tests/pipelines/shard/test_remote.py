"""Corpora and datasets on S3: the same bytes as on a local disk."""

import fsspec
import pytest

from blt.errors import DataError
from pipelines.manifest import read_manifest
from pipelines.shard import ShardConfig, SourceConfig, collect_garbage, plan_corpus, shard_corpus, shard_status
from pipelines.storage import Storage
from tests.pipelines.shard.corpora import FORMATS, shard, tree, write_texts
from tests.s3_server import S3Server

pytestmark = [pytest.mark.s3, pytest.mark.ray, pytest.mark.slow]


@pytest.mark.usefixtures("ray_local")
def test_a_corpus_on_s3_gives_the_dataset_of_the_same_files_on_disk(
    s3: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("remote")
    for number, suffix in enumerate(FORMATS):
        write_texts(root / "in", f"{number}", suffix, [f"{i % 9} Größe {suffix[:3]}" for i in range(12)])
    (root / "in" / "bad.jsonl").write_text("broken\n" * 30)
    fsspec.filesystem("s3").put(f"{root}/in", s3.url("sharded/in"), recursive=True)
    settings = {"valid_fraction": 0.4, "group_bytes": 1500, "dedup": True}

    def config(place: str) -> ShardConfig:
        sources = (
            SourceConfig(name="lines", input=(f"{place}/*.jsonl*",)),
            SourceConfig(name="rest", input=(f"{place}/*.txt*", f"{place}/3.parquet")),
        )
        return ShardConfig(sources=sources, **settings)  # type: ignore[arg-type]

    local = shard(config(str(root / "in")), root / "out")
    remote, output = config(s3.url("sharded/in")), s3.url("sharded/out")
    plan = plan_corpus(remote)
    assert shard_corpus(plan, remote, output, lambda num_bytes: None) == local == read_manifest(output)
    storage = Storage(output)
    assert {path: storage.sha256(path) for path in storage.list()} == tree(root / "out")
    status = shard_status(output)
    assert (status.complete, status.groups, status.groups_done) == (True, len(plan.groups), len(plan.groups))
    for path in ("manifest.json", local.shards[0].path, "_commits/group-00001.json"):
        storage.delete(path)
    assert not shard_status(output).complete
    assert shard_corpus(plan, remote, output, lambda num_bytes: None) == local
    assert {path: storage.sha256(path) for path in storage.list()} == tree(root / "out")
    storage.write_exclusive("_dedup/runs.json", b"[]")
    assert collect_garbage(output, 0).scratch == ("_dedup/runs.json",)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("s3://blt/no-such-thing.jsonl", "does not exist"),
        ("s3://blt/no-such-place/*.jsonl", "holds no file"),
        ("s3://no-such-bucket/a.jsonl", "does not exist"),
    ],
)
def test_what_is_missing_on_s3_is_named_in_one_line(s3: S3Server, entry: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        plan_corpus(ShardConfig(input=(entry,)))
    assert "\n" not in str(error.value)
