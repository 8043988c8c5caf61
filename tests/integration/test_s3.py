"""Corpus, documents, entropy model, calibration and patches on S3, through commands run as a user runs them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from blt.checkpoint import save_entropy_model
from blt.entropy_model import EntropyModel, EntropyModelConfig
from blt.layers import TransformerConfig
from pipelines import open_patches
from pipelines.storage import Storage
from tests.s3_server import ACCESS_KEY, SECRET_KEY, S3Server

pytestmark = [pytest.mark.ray, pytest.mark.s3, pytest.mark.slow, pytest.mark.timeout(600)]

SPEECHES = Path(__file__).parent.parent / "data" / "speeches.jsonl"


@pytest.fixture
def corpus(s3: S3Server, tmp_path: Path) -> str:
    """The test speeches and an entropy model, both on S3 alone."""
    torch.manual_seed(0)
    shape = TransformerConfig(width=32, layers=1, heads=2, window=64)
    save_entropy_model(EntropyModel(EntropyModelConfig(transformer=shape)), tmp_path / "model")
    root = s3.url("commands")
    storage = Storage(root)
    storage.write_replace("corpus/speeches.jsonl", SPEECHES.read_bytes())
    for file in (tmp_path / "model").iterdir():
        storage.write_replace(f"model/{file.name}", file.read_bytes())
    return root


def command(*arguments: str, status: int = 0, **environment: str) -> tuple[dict[str, object], str]:
    """The last line of a command's output, and all that it printed."""
    completed = subprocess.run(
        [sys.executable, "-m", "jobs", *arguments, "--verbose"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | environment,
    )
    printed = completed.stdout + completed.stderr
    assert completed.returncode == status, printed[-3000:]
    found = json.loads(completed.stdout.splitlines()[-1])
    assert isinstance(found, dict)
    return found, printed


def test_every_data_job_runs_on_s3_alone(corpus: str) -> None:
    shard = ("shard", f"input=[{corpus}/corpus]", "valid_fraction=0.3", "shard_bytes=20000")
    documents, model = f"documents={corpus}/documents", f"entropy_model={corpus}/model"
    jobs = {
        "documents": (*shard, f"output={corpus}/documents"),
        "calibration": ("calibrate", documents, model, "sample_bytes=20000", "store_entropies=true"),
        "patches": ("patch", documents, model, f"calibration={corpus}/calibration", "store_entropies=true"),
    }
    printed = ""
    for name, arguments in jobs.items():
        result, text = command(*arguments, f"output={corpus}/{name}" if name != "documents" else "stall_seconds=600")
        assert result["status"] == "done"
        printed += text
    again, text = command(*jobs["patches"], f"output={corpus}/patches")
    assert again["status"] == "skipped"
    assert "ray started" not in text
    for action in ("--status", "--verify"):
        result, text = command(*jobs["patches"], action, f"output={corpus}/patches")
        assert result["status"] == "done"
        printed += text
    dataset = open_patches(f"{corpus}/patches")
    assert sum(batch.num_rows for batch in dataset) == again["documents"] == dataset.manifest.documents
    stored = b"".join(Storage(corpus).read_bytes(path) for path in Storage(corpus).list())
    for secret in (SECRET_KEY, ACCESS_KEY):
        assert secret not in printed
        assert secret.encode() not in stored


def test_a_wrong_secret_is_one_line_that_does_not_show_it(corpus: str) -> None:
    arguments = ("patch", f"documents={corpus}/documents", f"entropy_model={corpus}/model", f"output={corpus}/refused")
    result, printed = command(*arguments, status=1, AWS_SECRET_ACCESS_KEY="planted-wrong-secret")
    assert corpus in str(result["error"])
    assert "planted-wrong-secret" not in printed
    assert "Traceback" not in str(result["error"])


@pytest.mark.parametrize("uri", ["s3://key:planted@blt/documents", "s3://blt/documents?secret=planted"])
def test_credentials_in_an_uri_are_refused_unseen(uri: str) -> None:
    result, printed = command("patch", f"documents={uri}", "entropy_model=m", "output=o", status=2)
    assert "credentials" in str(result["error"])
    assert "planted" not in printed
