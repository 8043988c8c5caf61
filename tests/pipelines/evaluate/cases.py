"""Documents with their patches, as a dataset and as files, for tests of evaluation."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from blt.checkpoint import LanguageModel
from blt.entropy_model import document_entropies
from blt.patching import PatchRule, document_patch_starts
from pipelines.evaluate import EvaluateConfig
from pipelines.manifest import Patching
from tests.pipelines.train.patched import Patched, random_document, write_patches
from tests.small_language_model import small_language_model

RULE = PatchRule(threshold=5.129, max_patch_length=6)
"""In a gap of 0.0018 nats between the entropies of TEXTS: about a third of the bytes start a patch."""

SHARDS = {
    "train/shard-00000.parquet": [random_document(99, 50)],
    "valid/shard-00000.parquet": [random_document(seed, length) for seed, length in enumerate([80, 0, 130, 5, 40])],
    "valid/shard-00001.parquet": [],
    "valid/shard-00002.parquet": [random_document(seed, 30) for seed in range(10, 14)],
}
SOURCES = {"valid/shard-00002.parquet": "other"}
VALID = [document for path, documents in SHARDS.items() if path.startswith("valid") for document in documents]
CONFIG = EvaluateConfig(sequence_patches=20, sequence_bytes=48, batch_bytes=100, bootstrap_resamples=50, max_actors=2)
PATCHING = Patching(
    entropy_model=small_language_model().entropy_fingerprint,
    rule=RULE,
    reset_on_newline=False,
    dtype="float32",
    device="cpu",
)

TEXTS = {
    "poems": ["Über allen Gipfeln\nist Ruh", "x", "In allen Wipfeln spürest du kaum einen Hauch. " * 3],
    "code": ["for i in range(10):\n    print(i)\n" * 4, "日本語のコメント # 🙂\n" * 5, "ß"],
}
"""Documents of two sources."""


def write_files(root: Path, texts: Mapping[str, Sequence[str]] = TEXTS) -> dict[str, str]:
    """A file of JSON lines for each source, ids as in `write_dataset`; its path by source."""
    root.mkdir(parents=True, exist_ok=True)
    for source, documents in texts.items():
        lines = [json.dumps({"id": f"{n}", "text": text}) + "\n" for n, text in enumerate(documents)]
        (root / f"{source}.jsonl").write_text("".join(lines))
    return {source: str(root / f"{source}.jsonl") for source in texts}


def patched_by(model: LanguageModel, text: bytes) -> Patched:
    """The document with the patches that the model finds."""
    entropies = None
    if model.entropy_model is not None:
        entropies = document_entropies(model.entropy_model, [text], reset_on_newline=model.reset_on_newline)[0]
    return Patched(text, tuple(document_patch_starts(text, entropies, model.patch_rule).tolist()))


def write_dataset(root: Path, texts: Mapping[str, Sequence[str]] = TEXTS) -> str:
    """The same documents as a patch dataset of the small language model, a shard for each source; its root."""
    model = small_language_model(RULE)
    shards = {
        f"valid/shard-{n:05d}.parquet": [patched_by(model, text.encode()) for text in texts[source]]
        for n, source in enumerate(sorted(texts))
    }
    sources = dict(zip(shards, sorted(texts), strict=True))
    return write_patches(root, shards, patching=PATCHING, sources=sources)
