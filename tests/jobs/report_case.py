"""A small finished run for the tests of the report: hostile text, a random entropy model, made-up figures."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import msgspec
import torch

from blt.checkpoint import fingerprint, save_entropy_model
from blt.entropy_model import EntropyModel, EntropyModelConfig, document_entropies
from blt.layers import TransformerConfig
from blt.patching import PatchRule, document_patch_starts
from jobs.record import JobResult, write_record
from jobs.report_run import COMMANDS
from jobs.sample import Sample
from pipelines.evaluate.evaluation import Evaluation, write_evaluation
from pipelines.manifest import Manifest, Patching, ShardEntry, read_manifest, write_manifest
from pipelines.patch.calibration import Calibration, CalibrationRow, SourceCalibration, write_calibration
from pipelines.patch.rows import patched_table, read_row_groups
from pipelines.schema import PATCH_SCHEMA
from pipelines.storage import Storage
from pipelines.train.timeline import Entry, Event, Joined, Saved, Started, Step, TimelineWriter
from tests.parquet_bytes import encode_parquet
from tests.pipelines.patch.corpus import EDGE_DOCUMENTS, write_documents

HOSTILE = (
    "<script>alert('Ü')</script> & \"quotes\"\r\n\ttab 日本語 e\u0301 \u202ereversed\n".encode()
    + b"\xff\x00 broken \xe2\x82 end\n"
    + b"many plain words that fill some lines of text " * 20
)
SAMPLED_SOURCES = {"<b>code</b>": 334, "english": 600, "deutsch": 300}
"""Sources of the calibration, and the bytes that were sampled of each."""
RULE = PatchRule(threshold=2.0, max_patch_length=32)


def steps_made(first: int, last: int, at: float, *, workers: int) -> list[Step]:
    """One a second, the first of them begun at `at`."""
    return [
        Step(at=at + 1 + step - first, step=step, workers=workers, sequences="0f", loss=1.0, seconds=1.0)
        for step in range(first, last + 1)
    ]


DEATH = "worker 1: <ActorDied> connection\x07 lost"
TIMELINE: tuple[Entry, ...] = (
    Started(at=0.0),
    Joined(at=9.5, worker="a", step=0),
    *steps_made(1, 40, 10.0, workers=3),
    Saved(at=45.0, step=36, blocked_seconds=0.5, seconds=2.0),
    Event(at=51.0, cause="failure", detail=DEATH),
    *steps_made(37, 70, 62.0, workers=2),
    Event(at=97.0, cause="growth", detail="2 -> 3 workers"),
    *steps_made(71, 99, 100.0, workers=3),
    Event(at=129.5, cause="failure", detail="worker 2 died"),
    Step(at=131.5, step=100, workers=3, sequences="0f", loss=1.0, seconds=1.0, tries=2),
    Saved(at=132.0, step=100, blocked_seconds=0.75, seconds=0.75),
)
"""100 steps of a second each: one death costs 4 steps and 16 seconds, a growth 4 seconds, another death a try and 1.5
seconds."""
SAMPLE_TEXT = "the <i>Union</i> & \x07 the Congress"
EVALUATION = Evaluation(
    documents=2,
    bytes=1041,
    patches=235,
    mean_patch_bytes=4.43,
    nats=1700.0,
    bpb=2.4125,
    bpb_low=2.371,
    bpb_high=2.455,
    seconds=12.0,
    bytes_per_second=21300.0,
    baselines={"gzip -9": 2.8321, "xz -9": 2.4472, "order-0": 4.3813},
    entropy_model_bpb=2.6041,
    per_source=(),
    split="valid",
    sequence_patches=64,
    sequence_bytes=512,
    model="ab" * 32,
    data="cd" * 32,
)

"""A record of before there were accuracy, FLOPs, noise and samples."""

NOISE_FIGURES = {
    "documents": 3,
    "bytes": 1234,
    "patches": 300,
    "mean_patch_bytes": 4.1133,
    "nats": 1000.0,
    "bpb": 1.23456,
    "bpb_low": 1.2,
    "bpb_high": 1.3,
    "accuracy": 0.625,
    "one_byte_share": 0.25,
}
SOURCE_FIGURES = {
    **NOISE_FIGURES,
    "entropy_model_bpb": 2.5,
    "model_flops_per_byte": 1.2345e9,
    "entropy_model_flops_per_byte": 9.6e7,
    "flops_per_byte": 1.3305e9,
    "baselines": {"gzip -9": 2.8, "zstd -19": 2.4},
}


def write_run(root: Path) -> Path:
    """Write every part of a run below `root`."""
    documents = write_documents(
        root / "documents",
        {"train/shard-00000.parquet": EDGE_DOCUMENTS, "valid/shard-00000.parquet": [b"short", HOSTILE]},
    )
    model = _entropy_model()
    save_entropy_model(model, root / "entropy_model" / "model")
    write_patches(root / "patches", documents, model)
    write_calibration(str(root / "calibration"), _calibration(fingerprint(model)))
    for part, bpb in (("entropy_model", 3.0), ("model", 2.0)):
        _write_metrics(root / part, bpb)
    write_timeline(root / "model", TIMELINE)
    write_timeline(root / "entropy_model", [Started(at=0.0), *steps_made(1, 30, 4.0, workers=2)])
    write_evaluation(str(root / "evaluation"), EVALUATION)
    Storage(str(root / "sample")).write_replace("sample.json", msgspec.json.encode(_sample()))
    for index, part in enumerate(COMMANDS, start=1):
        result = JobResult(seconds=10.5 * index, bytes=1000 * index, figures={"bytes_per_second": 12345})
        write_record(root / part, {"key": f"<of {part}>"}, part, result)
    return root


def write_patches(root: Path, documents: str, model: EntropyModel) -> None:
    """The patch dataset of a document dataset, as `blt patch` makes it."""
    manifest, storage = read_manifest(documents), Storage(str(root))
    entries = []
    for entry in manifest.shards:
        tables = []
        for table in read_row_groups(Storage(documents), entry.path, 2**20):
            texts = table["text"].to_pylist()
            entropies = document_entropies(model, texts)
            starts = [document_patch_starts(t, e, RULE).numpy() for t, e in zip(texts, entropies, strict=True)]
            tables.append(patched_table(table, starts))
        data = encode_parquet(tables, PATCH_SCHEMA, {})
        assert storage.write_exclusive(entry.path, data)
        patches = sum(sum(table["n_patches"].to_pylist()) for table in tables)
        entries.append(_entry(entry, data, patches))
    patching = Patching(
        entropy_model=fingerprint(model), rule=RULE, reset_on_newline=False, dtype="float32", device="cpu"
    )
    whole = Manifest(kind="patches", shards=tuple(entries), counts=manifest.counts, patching=patching)
    write_manifest(storage.root_uri, whole)
    total = {"total": {"actor_bytes_per_second": 54321.0}, "shards": {}}
    storage.write_replace("stats.json", json.dumps(total).encode())


def _entry(entry: ShardEntry, data: bytes, patches: int) -> ShardEntry:
    return msgspec.structs.replace(entry, patches=patches, sha256=hashlib.sha256(data).hexdigest())


def _entropy_model() -> EntropyModel:
    torch.manual_seed(0)
    model = EntropyModel(EntropyModelConfig(transformer=TransformerConfig(width=32, layers=2, heads=2, window=64)))
    with torch.no_grad():
        model.output.weight.mul_(6.0)
    return model.eval()


def _calibration(entropy_model: str) -> Calibration:
    return Calibration(
        threshold=2.0,
        mean_patch_bytes=4.5,
        target_mean_patch_bytes=4.4,
        rule=dataclasses.replace(RULE, quantized=True),
        reset_on_newline=False,
        entropy_model=entropy_model,
        documents="ef" * 32,
        sample_documents=6,
        sample_bytes=1234,
        seed=0,
        dtype="float32",
        device="cpu",
        table=_calibration_table(1.0),
        sources=tuple(
            SourceCalibration(
                source=source, sample_documents=2, sample_bytes=num_bytes, table=_calibration_table(num_bytes / 500)
            )
            for source, num_bytes in SAMPLED_SOURCES.items()
        ),
    )


def _calibration_table(factor: float) -> tuple[CalibrationRow, ...]:
    return tuple(
        CalibrationRow(threshold=t, mean_patch_bytes=m * factor, p99_patch_bytes=9, one_byte_share=share)
        for t, m, share in ((1.0, 2.0, 0.5), (2.0, 4.5, 0.125), (3.0, 90.0, 0.0))
    )


def _write_metrics(root: Path, bpb: float) -> None:
    speed = {"train/step_seconds": 0.25, "train/mfu": 0.3125, "train/data_wait_fraction": 0.0025}
    speed |= {"train/bytes_per_second": 34567.0, "train/patches_per_second": 7654.0, "train/peak_memory_bytes": 5e8}
    records = [{"step": s, "train/loss": bpb * 0.69 + 9 / s, "train/bpb": bpb + 13 / s} | speed for s in range(1, 101)]
    records.append({"step": 100, "valid/loss": bpb * 0.7, "valid/bpb": bpb + 0.125})
    root.mkdir(parents=True, exist_ok=True)
    (root / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def write_timeline(root: Path, entries: Iterable[Entry]) -> None:
    """The timeline of a training that has none yet."""
    writer = TimelineWriter(root)
    for entry in entries:
        writer.write(entry)
    writer.close()


def _sample() -> Sample:
    return Sample(
        prompt="Fellow <citizens>, ",
        text=SAMPLE_TEXT,
        bytes=33,
        valid_utf8=True,
        seconds=4.06,
        bytes_per_second=8.0,
        seed=1,
        temperature=0.8,
        top_k=None,
        top_p=None,
        model="ab" * 32,
    )
