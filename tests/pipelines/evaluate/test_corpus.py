"""Text files evaluated: the figures of a patch dataset of the same documents, every row accounted for."""

import dataclasses
import gzip
import json
import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blt.errors import ConfigError, DataError
from blt.patching import PatchRule
from pipelines.evaluate import Evaluation, TextConfig, open_corpus, open_patched
from pipelines.evaluate.baselines import StreamSizes
from pipelines.evaluate.corpus import CorpusDocuments, cut_into_units
from pipelines.evaluate.documents import DocumentBatch
from pipelines.evaluate.evaluation import NotText
from pipelines.evaluate.noise import NOISES, Noise, disturb
from pipelines.evaluate.rejects import RAW, UnitRows
from pipelines.shard import SourceConfig
from pipelines.shard.files import InputFile
from tests.pipelines.evaluate.cases import CONFIG, TEXTS, write_dataset, write_files
from tests.pipelines.evaluate.in_process import evaluate_here
from tests.small_language_model import save_small_language_model

EVERYTHING = dataclasses.replace(CONFIG, noise=True, samples=3, sample_bytes=9)


def corpus(root: Path, *, language_key: str | None = None, **files: str) -> CorpusDocuments:
    """Each of `files`, source=path, as a source of its own."""
    sources = tuple(SourceConfig(name=name, input=(path,)) for name, path in files.items())
    return open_corpus(TextConfig(sources=sources, language_key=language_key), str(root / "out"))


def compared(evaluation: Evaluation) -> list[list[float | int | str | None]]:
    """What must agree between two ways to give the same documents, patches and counts exactly."""
    parts = (*evaluation.per_source, evaluation, *evaluation.noise)
    return [[p.documents, p.bytes, p.patches, p.one_byte_share, p.mean_patch_bytes] for p in parts]


def test_files_give_what_their_patch_dataset_gives(model: str, tmp_path: Path) -> None:
    files = evaluate_here(EVERYTHING, model, corpus(tmp_path, **write_files(tmp_path / "files")))
    dataset = evaluate_here(EVERYTHING, model, open_patched(write_dataset(tmp_path / "data"), "valid"))
    assert compared(files) == compared(dataset)
    assert 0 < (files.one_byte_share or 0) < 1
    assert [part.source for part in files.per_source] == ["code", "poems"]
    for ours, theirs in zip(
        (*files.per_source, files, *files.noise), (*dataset.per_source, dataset, *dataset.noise), strict=True
    ):
        assert ours.nats == pytest.approx(theirs.nats, rel=1e-6)  # float32, other batches
        assert ours.accuracy == theirs.accuracy
    assert files.entropy_model_bpb == pytest.approx(dataset.entropy_model_bpb, rel=1e-6)
    assert files.baselines == dataset.baselines  # both in the order of sources and lines
    assert [part.baselines for part in files.per_source] == [part.baselines for part in dataset.per_source]
    assert files.samples == dataset.samples
    assert (files.split, dataset.split) == (None, "valid")


def test_every_format_holds_the_same_documents(model: str, tmp_path: Path) -> None:
    texts = [text for documents in TEXTS.values() for text in documents]
    lines = "".join(json.dumps({"text": text, "id": f"{n}"}) + "\n" for n, text in enumerate(texts)).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    pq.write_table(pa.table({"text": texts, "id": [f"{n}" for n in range(len(texts))]}), tmp_path / "c.parquet")
    (tmp_path / "txt").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "txt" / f"{number}.bin").write_bytes(text.encode())
    source = SourceConfig(name="d", input=(str(tmp_path / "txt"),), format="binary")
    named = (SourceConfig(name=file.name[0], input=(str(file),)) for file in sorted(tmp_path.glob("*.*")))
    config = TextConfig(sources=(*named, source))
    found = evaluate_here(CONFIG, model, open_corpus(config, str(tmp_path / "out")))
    assert [part.source for part in found.per_source] == ["a", "b", "c", "d"]
    first = found.per_source[0]
    assert first.documents == len(texts)
    assert all(dataclasses.replace(part, source="a") == first for part in found.per_source)


def test_baselines_of_a_part_are_those_of_its_text(model: str, tmp_path: Path) -> None:
    found = evaluate_here(CONFIG, model, corpus(tmp_path, **write_files(tmp_path / "files")))
    for part, texts in [(found, [*TEXTS["code"], *TEXTS["poems"]]), (found.per_source[1], TEXTS["poems"])]:
        sizes = StreamSizes()
        sizes.add("".join(texts).encode())
        assert part.baselines == {name: 8 * size / part.bytes for name, size in sizes.finish().items()}


def test_languages_are_what_the_rows_say(model: str, tmp_path: Path) -> None:
    rows = [("de", "Füße"), ("en", "feet and feet"), (None, "?"), ("de", "noch mehr Füße")]
    lines = [json.dumps({"text": text} | ({"lang": lang} if lang else {})) for lang, text in rows]
    (tmp_path / "a.jsonl").write_text("\n".join(lines[:3]))
    (tmp_path / "b.jsonl").write_text(lines[3])
    files = {"a": str(tmp_path / "a.jsonl"), "b": str(tmp_path / "b.jsonl")}
    found = evaluate_here(CONFIG, model, corpus(tmp_path, language_key="lang", **files))
    assert [part.language for part in found.per_language] == ["de", "en", None]
    for part in found.per_language:
        texts = [text.encode() for lang, text in rows if lang == part.language]
        sizes = StreamSizes()
        sizes.add(b"".join(texts))
        assert (part.documents, part.bytes) == (len(texts), sum(map(len, texts)))
        assert part.baselines == {name: 8 * size / part.bytes for name, size in sizes.finish().items()}
    assert sum(part.nats for part in found.per_language) == pytest.approx(found.nats, rel=1e-12)
    assert evaluate_here(CONFIG, model, corpus(tmp_path, **files)).per_language == ()
    assert evaluate_here(CONFIG, model, corpus(tmp_path, language_key="tongue", **files)).per_language == ()


def test_rows_that_are_no_documents_are_counted_and_listed(model: str, tmp_path: Path) -> None:
    good = json.dumps({"text": "good text"})
    (tmp_path / "a.jsonl").write_bytes("\n".join([good, "{", '{"text": ""}', good, '{"no": 1}\n']).encode())
    pq.write_table(pa.table({"text": ["text", None, "more"]}), tmp_path / "b.parquet")
    documents = corpus(tmp_path, a=str(tmp_path / "a.jsonl"), b=str(tmp_path / "b.parquet"))
    out = tmp_path / "out"
    for _ in range(2):  # a second run takes the place of one that did not finish
        (out / RAW).mkdir(parents=True, exist_ok=True)
        (out / RAW / "00000-00000.jsonl").write_text("of a killed run")
        found = evaluate_here(CONFIG, model, documents)
        assert {name: (r.rows_in, r.rows_out, r.quarantined, r.filtered) for name, r in found.rows.items()} == {
            "a": (5, 2, 2, 1),
            "b": (3, 2, 1, 0),
        }
        assert (found.documents, found.bytes) == (4, 26)
        listed = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
        assert [(row["source"], row["file"], row["line"]) for row in listed] == [
            ("a", "a.jsonl", 2),
            ("a", "a.jsonl", 5),
            ("b", "b.parquet", 2),
        ]
        assert not (out / RAW).exists()


def test_a_file_in_ranges_gives_what_it_gives_whole(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [json.dumps({"text": "word " * (n % 7), "id": f"{n}"}) if n % 5 else "no json" for n in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    config, file = dataclasses.replace(CONFIG, noise=("repeat",)), str(tmp_path / "a.jsonl")
    whole = evaluate_here(config, model, corpus(tmp_path, a=file))
    listed = (tmp_path / "out" / "quarantine.jsonl").read_bytes()
    assert [json.loads(line)["line"] for line in listed.splitlines()] == [n + 1 for n in range(0, 40, 5)]
    monkeypatch.setattr("pipelines.evaluate.corpus._LEAST_UNIT_BYTES", 100)
    documents = corpus(tmp_path, a=file)
    assert len(documents.units()) > 10
    parts = evaluate_here(config, model, documents)
    assert compared(parts) == compared(whole)
    assert parts.nats == pytest.approx(whole.nats, rel=1e-6)  # float32, other batches
    assert (parts.rows, parts.baselines) == (whole.rows, whole.baselines)
    assert (tmp_path / "out" / "quarantine.jsonl").read_bytes() == listed


def test_an_input_without_a_byte_is_refused_and_its_rows_are_listed(model: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"txt": "a"}\n{"txt": "b"}\n')
    with pytest.raises(DataError, match=r"2 rows read, 2 refused, 0 filtered out; first refused: a.jsonl \(offset 0\)"):
        evaluate_here(CONFIG, model, corpus(tmp_path, a=str(tmp_path / "a.jsonl")))
    assert len((tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()) == 2


def test_a_source_without_documents_has_a_row(model: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "b.jsonl").write_text('{"txt": "b"}\n')
    files = {"a": str(tmp_path / "a.jsonl"), "b": str(tmp_path / "b.jsonl")}
    empty = evaluate_here(CONFIG, model, corpus(tmp_path, **files)).per_source[1]
    assert (empty.source, empty.documents, empty.bytes, empty.bpb, empty.bpb_low, empty.flops_per_byte) == (
        *("b", 0, 0),
        *(None, None, None),
    )
    assert empty.baselines == {}


@pytest.mark.parametrize("rule", [PatchRule(kind="space", max_patch_length=6), PatchRule(kind="fixed", patch_size=4)])
def test_rules_that_need_no_entropies_patch_files_too(rule: PatchRule, tmp_path: Path) -> None:
    model = save_small_language_model(tmp_path / "model", rule)
    found = evaluate_here(CONFIG, model, corpus(tmp_path, **write_files(tmp_path / "files")))
    assert found.entropy_model_bpb is None
    texts = [text.encode() for documents in TEXTS.values() for text in documents]
    if rule.kind == "fixed":
        assert found.patches == sum(math.ceil(len(text) / 4) for text in texts)
    assert found.bytes == sum(map(len, texts))


def test_a_long_document_is_read_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.evaluate.corpus.BATCH_BYTES", 10)
    monkeypatch.setattr("pipelines.evaluate.corpus._DOCUMENT_OVERHEAD_BYTES", 0)
    lines = [json.dumps({"text": "x" * size}) + "\n" for size in (3, 4, 50, 9, 2)]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    documents = corpus(tmp_path, a=str(tmp_path / "a.jsonl"))
    found = [item for unit in documents.units() for item in documents.read(unit)]
    sizes = [[len(text) for text in item.texts] for item in found if isinstance(item, DocumentBatch)]
    assert sizes == [[3, 4], [50], [9], [2]]
    assert isinstance(found[-1], UnitRows)


FILES = st.lists(st.tuples(st.integers(0, 40 * 2**20), st.sampled_from(["jsonl", "txt"])), min_size=1, max_size=30)


@given(st.dictionaries(st.sampled_from("abc"), FILES, min_size=1, max_size=3))
def test_units_hold_every_byte_once_in_order(sizes: dict[str, list[tuple[int, str]]]) -> None:
    files = {
        source: [
            InputFile(url=f"/{source}/{n}", name=f"{n:03d}", format=kind, size_bytes=size, sample="")  # type: ignore[arg-type]
            for n, (size, kind) in enumerate(members)
        ]
        for source, members in sizes.items()
    }
    groups = cut_into_units(files)
    assert [group.index for group in groups] == list(range(len(groups)))
    units = [(group.source, unit) for group in groups for unit in group.units]
    assert [(source, u.file.name, u.start) for source, u in units] == sorted(
        ((source, u.file.name, u.start) for source, u in units), key=lambda place: (list(files).index(place[0]), place)
    )
    assert sum(u.input_bytes for _, u in units) == sum(size for members in sizes.values() for size, _ in members)
    assert {(s, u.file.name) for s, u in units} == {(s, file.name) for s, members in files.items() for file in members}
    assert [u.rank for _, u in units] == sorted(u.rank for _, u in units)
    for group in groups:
        assert len(group.units) == 1 or sum(u.text_bytes for u in group.units) <= 8 * 2**20


@pytest.mark.parametrize(("key", "wanted"), [("text", "text"), ("", "''"), ("id", "'id'")])
def test_the_key_of_the_language_is_one_of_its_own(key: str, wanted: str) -> None:
    with pytest.raises(ConfigError, match=f"language_key .*{wanted}"):
        TextConfig(input=("x",), language_key=key)


def test_an_output_that_a_second_run_would_read_is_refused(tmp_path: Path) -> None:
    write_files(tmp_path / "files")
    with pytest.raises(ConfigError, match="lies inside input"):
        open_corpus(TextConfig(input=(str(tmp_path / "files"),)), str(tmp_path / "files" / "out"))


@pytest.mark.parametrize("noise", NOISES)
def test_a_noise_gives_what_the_noised_files_give(noise: Noise, model: str, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, noise=(noise,), seed=3)
    files = write_files(tmp_path / "files", {"a": TEXTS["poems"]})
    clean, noised = evaluate_here(config, model, corpus(tmp_path, **files)).noise
    texts = [disturb(text.encode(), noise, 3, f"{n}").decode() for n, text in enumerate(TEXTS["poems"])]
    expected = evaluate_here(CONFIG, model, corpus(tmp_path, **write_files(tmp_path / "noised", {"a": texts})))
    assert noised.noise == noise
    assert (noised.bytes, noised.patches) == (expected.bytes, expected.patches)
    assert noised.nats == expected.nats
    assert (noised.accuracy, noised.one_byte_share) == (expected.accuracy, expected.one_byte_share)
    assert clean.bytes == sum(len(text.encode()) for text in TEXTS["poems"])


def test_documents_that_are_no_text_are_left_out_under_noise(model: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name, content in {"a": b"text", "b": b"\xff\xfe", "c": b"more text \xc3"}.items():
        (tmp_path / "in" / name).write_bytes(content)
    documents = open_corpus(TextConfig(input=(str(tmp_path / "in"),), format="binary"), str(tmp_path / "out"))
    found = evaluate_here(
        dataclasses.replace(CONFIG, noise=("upper_case",), samples=4, sample_bytes=3), model, documents
    )
    assert (found.documents, found.bytes) == (3, 17)
    assert found.not_text == NotText(documents=2, bytes=13)
    assert [(row.noise, row.documents, row.bytes) for row in found.noise] == [("clean", 1, 4), ("upper_case", 1, 4)]
    assert found.samples is not None
    assert found.samples.documents == 2  # "te" and "more t", though what follows is no text
