"""The tables of an evaluation: every figure in its column, old records and missing figures left out."""

import dataclasses
import io

from rich.console import Console

from jobs.evaluate_table import print_evaluation, sample_line, tables
from pipelines.evaluate.evaluation import LanguageFigures, NoiseFigures, NotText, SourceFigures
from pipelines.evaluate.samples import SampleFigures
from tests.jobs.report_case import EVALUATION, NOISE_FIGURES, SOURCE_FIGURES


def test_a_row_holds_the_figures_of_its_source() -> None:
    source = SourceFigures(source="a\x1b", **SOURCE_FIGURES)  # type: ignore[arg-type]
    bpb, patches = tables(dataclasses.replace(EVALUATION, per_source=(source,)))
    assert bpb.columns[3:] == ("BLT", "95 % interval", "accuracy", "entropy model", "gzip -9", "zstd -19")
    assert bpb.rows == (("a\\x1b", "3", "1,234", "1.235", "1.200 to 1.300", "62.5 %", "2.500", "2.800", "2.400"),)
    assert patches.rows == (("a\\x1b", "300", "4.113", "25.0 %", "1.23 G", "96 M", "1.33 G"),)


def test_several_sources_have_a_row_for_all() -> None:
    parts = tuple(SourceFigures(source=name, **SOURCE_FIGURES) for name in "ab")  # type: ignore[arg-type]
    languages = tuple(LanguageFigures(language=name, **SOURCE_FIGURES) for name in ("de", None))  # type: ignore[arg-type]
    found = tables(dataclasses.replace(EVALUATION, per_source=parts, per_language=languages))
    assert [[row[0] for row in table.rows] for table in found] == [["a", "b", "all"]] * 2 + [
        ["de", "(none given)", "all"]
    ] * 2
    assert all(table.last_is_total for table in found)


def test_what_was_not_measured_is_left_blank() -> None:
    """A record of before, and a source without a byte."""
    (all_bpb,), (all_patches,) = (table.rows for table in tables(EVALUATION))
    assert all_bpb == ("all", "2", "1,041", "2.413", "2.371 to 2.455", "", "2.604", "2.832", "2.447", "4.381")
    assert all_patches == ("all", "235", "4.430", "", "", "", "")
    one = SourceFigures(source="a", **(SOURCE_FIGURES | {"documents": 1}))  # type: ignore[arg-type]
    assert (
        tables(dataclasses.replace(EVALUATION, per_source=(one,)))[0].rows[0][4] == ""
    )  # says nothing of one document
    assert sample_line(EVALUATION) is None


def test_noise_and_samples_are_told() -> None:
    rows = tuple(NoiseFigures(noise=name, **NOISE_FIGURES) for name in ("clean", "ant_speak"))  # type: ignore[arg-type]
    samples = SampleFigures(
        samples=8,
        documents=3,
        bytes=2000,
        valid=6,
        valid_share=0.75,
        cut=1,
        invalid_sequences=5,
        invalid_per_kb=2.5,
        sample_bytes=250,
        prefix_bytes=64,
        temperature=0.8,
        seed=0,
    )
    found = dataclasses.replace(EVALUATION, noise=rows, not_text=NotText(documents=2, bytes=99), samples=samples)
    table = tables(found)[-1]
    assert [row[0] for row in table.rows] == ["clean", "ant speak"]
    assert table.rows[1][3:] == ("1.235", "1.200 to 1.300", "62.5 %", "4.113")
    assert "2 documents of 99 bytes are no UTF-8" in table.note
    line = sample_line(found)
    assert line is not None
    for told in ("75.0 % of 8", "2,000 bytes at temperature 0.8", "2.50 invalid sequences per kB", "1 end inside"):
        assert told in line


def test_tables_are_printed_whole_where_there_is_no_terminal() -> None:
    source = SourceFigures(source="a" * 70, **SOURCE_FIGURES)  # type: ignore[arg-type]
    out = io.StringIO()
    print_evaluation(dataclasses.replace(EVALUATION, per_source=(source,)), Console(file=out, width=80))
    line = next(line for line in out.getvalue().splitlines() if "1.235" in line)
    assert line.split()[0] == "a" * 70
    assert line.split()[-1] == "2.400"
