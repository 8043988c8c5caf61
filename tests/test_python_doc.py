"""docs/python.md and the README's Python: every snippet runs, alone, and finds what is found here in another way."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import blt
from blt.decoder import Decoder
from blt.patching import PatchRule
from blt.vocabulary import BYTE_OFFSET
from tests.pipelines.train.patched import random_document, write_patches
from tests.small_language_model import save_small_language_model

ROOT = Path(__file__).parent.parent
SECTIONS = re.findall(r"\n## (.*?)\n(.*?)(?=\n## |\Z)", (ROOT / "docs" / "python.md").read_text("utf-8"), re.DOTALL)
README = (ROOT / "README.md").read_text(encoding="utf-8")

TEXT = b"Four score and seven years ago"
TRAIN = [random_document(seed, 77) for seed in range(8)]


def snippets(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def logits_after(lm: blt.LanguageModel, text: bytes) -> list[torch.Tensor]:
    """Logits after BOS and after each byte, a byte at a time."""
    decoder = Decoder(lm, 1)
    return [decoder.open([b""])[0], *(decoder.step([byte + BYTE_OFFSET])[0] for byte in text)]


def nats_of(lm: blt.LanguageModel, text: bytes, first: int = 0) -> float:
    after = zip(text, logits_after(lm, text)[:-1], strict=True)
    found = [logits.log_softmax(-1)[byte + BYTE_OFFSET] for byte, logits in after]
    return -float(sum(found[first:]))


def check_generated(found: Mapping[str, Any], lm: blt.LanguageModel) -> None:
    prompt = b"My fellow Americans, "
    assert found["text"] == b"".join(blt.stream(lm, prompt, max_new_bytes=64))
    again = [
        blt.generate(lm, text, max_new_bytes=64, temperature=0.8, top_p=0.95, seed=1, stop=[b"\n", b". "])
        for text in (prompt, b"Mr. Speaker, ")
    ]
    assert found["drawn"] == again


def check_streamed(found: Mapping[str, Any], lm: blt.LanguageModel) -> None:
    assert b"".join(found["pieces"]) == blt.generate(lm, b"The state of the union is ", max_new_bytes=32)


def check_patches(found: Mapping[str, Any], lm: blt.LanguageModel) -> None:
    assert b"".join(found["patches"]) == TEXT
    assert 1 < len(found["patches"]) < len(TEXT)
    assert max(map(len, found["patches"])) <= (lm.patch_rule.max_patch_length or 0)
    assert len(found["entropies"]) == len(TEXT) + 1


def check_entropies(found: Mapping[str, Any], lm: blt.LanguageModel) -> None:
    assert lm.entropy_model is not None
    (expected,) = blt.document_entropies(lm.entropy_model, [b"Four score"])
    assert torch.allclose(found["entropies"][0], expected, atol=1e-4)


def check_logits(found: Mapping[str, Any], lm: blt.LanguageModel) -> None:
    expected = torch.stack(logits_after(lm, TEXT))
    assert torch.allclose(found["logits"][0], expected, atol=1e-4)  # float32 sums in another order
    assert float(found["nats"]) == pytest.approx(nats_of(lm, TEXT), rel=1e-5)
    assert found["likeliest"] == bytes([int(expected[-1, BYTE_OFFSET:].argmax())])


def check_likelihoods(found: Mapping[str, Any], lm: blt.LanguageModel) -> None:
    assert found["nats"] == pytest.approx(nats_of(lm, TEXT), rel=1e-5)
    for name, word in (("good", b"years"), ("bad", b"yaers")):
        assert found[name].nats == pytest.approx(nats_of(lm, b"Four score and seven " + word, 21), rel=1e-5)


def check_dataset(found: Mapping[str, Any], lm: blt.LanguageModel) -> None:
    num_bytes = sum(len(document.text) for document in TRAIN)
    assert found["num_bytes"] == num_bytes
    assert found["mean_patch_bytes"] == num_bytes / sum(document.num_patches for document in TRAIN)


CHECKS: dict[str, list[Callable[[Mapping[str, Any], blt.LanguageModel], None]]] = {
    "Load and generate": [check_generated, check_streamed],
    "Entropies and patches": [check_patches, check_entropies],
    "Logits": [check_logits],
    "Likelihoods": [check_likelihoods],
    "Patch datasets": [check_dataset],
}


@pytest.fixture
def run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory in which runs/quickstart holds a small model and a small patch dataset."""
    run = tmp_path / "runs" / "quickstart"
    rule = PatchRule(threshold=5.0333, max_patch_length=6)  # near the median of its entropies
    save_small_language_model(run / "model" / "model", rule)
    write_patches(run / "patches", {"train/shard-00000.parquet": TRAIN, "valid/s.parquet": [random_document(99, 300)]})
    monkeypatch.chdir(tmp_path)
    return run


@pytest.mark.parametrize(("heading", "text"), SECTIONS, ids=[heading for heading, _ in SECTIONS])
def test_examples_find_what_they_say(run_directory: Path, heading: str, text: str) -> None:
    lm = blt.load(run_directory / "model" / "model")
    for snippet, check in zip(snippets(text), CHECKS[heading], strict=True):
        found: dict[str, Any] = {}
        exec(snippet, found)
        check(found, lm)


def test_every_section_has_its_checks() -> None:
    assert [heading for heading, _ in SECTIONS] == list(CHECKS)


@pytest.mark.parametrize("snippet", snippets(README), ids=lambda snippet: re.findall(r"import (\w+)", snippet)[0])
def test_the_readmes_python_runs(run_directory: Path, snippet: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(snippet, {})
    assert capsys.readouterr().out


def test_the_readme_has_python() -> None:
    assert len(snippets(README)) >= 2
    assert "docs/python.md" in README
