"""Files, model and output on S3: the figures of the same on a local disk."""

import dataclasses
import json
from pathlib import Path

import fsspec
import pytest

from pipelines.evaluate import TextConfig, open_corpus, open_patched, write_evaluation
from pipelines.evaluate.evaluation import read_evaluation
from pipelines.model_files import store_model
from pipelines.storage import Storage
from tests.pipelines.evaluate.cases import CONFIG, write_dataset, write_files
from tests.pipelines.evaluate.in_process import evaluate_here
from tests.s3_server import S3Server


@pytest.mark.s3
def test_everything_may_lie_on_s3(s3: S3Server, model: str, tmp_path: Path) -> None:
    write_files(tmp_path / "in")
    (tmp_path / "in" / "bad.jsonl").write_text("no json\n" * 3)
    write_dataset(tmp_path / "data")
    for name in ("in", "data"):
        fsspec.filesystem("s3").put(f"{tmp_path}/{name}", s3.url(f"evaluated/{name}"), recursive=True)
    store_model(model, s3.url("evaluated/model"))
    config = dataclasses.replace(CONFIG, samples=2, sample_bytes=4)
    found = []
    for place, directory in ((str(tmp_path), model), (s3.url("evaluated"), s3.url("evaluated/model"))):
        output = Storage(f"{place}/out")
        text = open_corpus(TextConfig(input=(f"{place}/in",)), output.root_uri)
        for documents in (text, open_patched(f"{place}/data", "valid")):
            evaluation = evaluate_here(config, directory, documents)
            found.append(dataclasses.replace(evaluation, seconds=0.0, bytes_per_second=0.0))
        write_evaluation(output.root_uri, found[-2])
        assert read_evaluation(output.root_uri) == found[-2]
        assert sorted(output.list()) == ["evaluation.json", "quarantine.jsonl"]
        listed = [json.loads(line) for line in output.read_bytes("quarantine.jsonl").splitlines()]
        assert [(row["file"], row["line"]) for row in listed] == [("bad.jsonl", 1), ("bad.jsonl", 2), ("bad.jsonl", 3)]
    assert found[:2] == found[2:]
