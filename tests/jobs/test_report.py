"""`blt report` on a small run: well-formed, self-contained, escaped, and with the numbers that the run holds."""

import dataclasses
import html
import io
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from blt.errors import ConfigError
from jobs import report
from jobs.command_line import main
from jobs.evaluate_table import sample_line, tables
from jobs.page import TEMPLATES
from jobs.report_calibration import WHOLE, calibration_charts, drawn_sources
from jobs.report_chart import STYLES
from jobs.report_patches import patch_lengths, read_passage
from jobs.report_run import COMMANDS, read_history, read_run, run_directories
from jobs.report_table import print_summary, stage_rows, summary_rows
from jobs.report_training import training_view, training_views
from pipelines.evaluate.evaluation import NoiseFigures, SourceFigures, write_evaluation
from pipelines.evaluate.samples import SampleFigures
from pipelines.manifest import read_manifest
from pipelines.patch.calibration import Calibration, read_calibration
from pipelines.storage import Storage
from pipelines.train.account import account_of
from pipelines.train.timeline import Entry, Event, Started, read_timeline
from tests.jobs.html_page import HtmlPage
from tests.jobs.report_case import (
    DEATH,
    EVALUATION,
    HOSTILE,
    NOISE_FIGURES,
    SAMPLE_TEXT,
    SOURCE_FIGURES,
    steps_made,
    write_run,
    write_timeline,
)
from tests.s3_server import S3Server


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture(scope="module")
def page_text(run_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    output = tmp_path_factory.mktemp("page") / "report.html"
    result = report.run(report.Config(run=str(run_directory), output=str(output), title="A <b>bold</b> title"))
    text = output.read_text(encoding="utf-8")
    assert (result.status, result.figures["page_bytes"]) == ("done", len(text.encode()))
    return text


def test_is_well_formed_and_loads_nothing(page_text: str) -> None:
    page = HtmlPage(page_text)
    assert page.open == []
    assert len(page_text) < 1_000_000
    links = [value for _, name, value in page.attributes if name in ("src", "href", "srcset", "data", "action")]
    assert links == ["data:,"]
    assert not re.search(r"https?:|//[a-z]|@import|url\(", page_text)
    assert not {"script", "img", "iframe", "object"} & {tag for tag, _, _ in page.attributes}
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert "default-src 'none'" in page_text


def test_holds_the_figures_of_the_run(page_text: str, run_directory: Path) -> None:
    text = HtmlPage(page_text).text
    manifest = read_manifest(str(run_directory / "patches"))
    patches = sum(shard.patches or 0 for shard in manifest.shards)
    bpbs = [EVALUATION.bpb, EVALUATION.bpb_low, EVALUATION.bpb_high, *EVALUATION.baselines.values(), 2.6041]
    figures = [f"{manifest.bytes:,}", f"{patches:,}", f"{manifest.bytes / patches:.3f} bytes", "2.0000 nats"]
    figures += [f"{bpb:.3f}" for bpb in bpbs] + ["54.3 kB/s", "12.3 kB/s", "294.0"]
    figures += [manifest.fingerprint, "<of calibration>", "1,234 bytes"]
    assert [figure for figure in figures if figure not in text] == []


def test_an_evaluation_is_shown_table_by_table(tmp_path: Path) -> None:
    """Sources of hostile names, noise and samples; a record of before has fewer tables, on the page of every test."""
    source = SourceFigures(source="<b>news</b>", **SOURCE_FIGURES)  # type: ignore[arg-type]
    noise = NoiseFigures(noise="ant_speak", **NOISE_FIGURES)  # type: ignore[arg-type]
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
    found = dataclasses.replace(EVALUATION, per_source=(source, source), noise=(noise,), samples=samples)
    write_evaluation(str(tmp_path / "evaluation"), found)
    report.run(report.Config(evaluation=str(tmp_path / "evaluation"), output=str(tmp_path / "page.html")))
    page = HtmlPage((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert page.open == []
    for table in tables(found):
        for text in (table.title, *table.columns, *(cell for row in table.rows for cell in row), table.note):
            assert text in page.text
    assert sample_line(found) in page.text  # type: ignore[operator]


def test_text_is_shown_byte_for_byte(page_text: str) -> None:
    page = HtmlPage(page_text)
    assert page.passage() == HOSTILE
    assert {"FF", "00", "0D", "↵", "⇥", "<", "日"} <= set(page.cells)
    assert "A <b>bold</b> title" in page.text
    assert "Fellow <citizens>, " + SAMPLE_TEXT.replace("\x07", "\\x07") in page.text


def test_curve_stands_under_its_byte(page_text: str, run_directory: Path) -> None:
    """Every word has a curve of its own width, and the entropies in the titles agree with the starts."""
    words = re.findall(
        r'class="word" style="width: (\d+)ch"><span>.*?viewBox="0 0 (\d+) 100".*?points="([^"]+)"',
        page_text,
        re.DOTALL,
    )
    assert words
    for columns, width, points in words:
        assert int(width) == 10 * int(columns)
        xs = [float(point.split(",")[0]) for point in points.split()]
        assert xs == sorted(xs)
        assert xs[0] < 10 * int(columns)
    titles = HtmlPage(page_text).titles
    lengths = [int(re.search(r"patch of (\d+)", title)[1]) for title in titles]  # type: ignore[index]
    passage = read_passage(
        str(run_directory / "patches"), read_manifest(str(run_directory / "patches")), num_bytes=1600
    )
    assert passage is not None
    assert set(lengths) == set(np.diff(np.flatnonzero([*passage.starts, True])).tolist())
    opening = [nats for starts, nats in zip(passage.starts[1:], _nats(titles)[1:], strict=True) if starts]
    assert max(opening) > 2.0
    assert max(nats for starts, nats in zip(passage.starts[1:], _nats(titles)[1:], strict=True) if not starts) <= 2.0


def _nats(titles: list[str]) -> list[float]:
    return [float(n) for title in titles for n in title.split(" · ")[1].removesuffix(" nats").split()]


@pytest.fixture(scope="module")
def calibration(run_directory: Path) -> Calibration:
    return read_calibration(str(run_directory / "calibration"))


def test_calibration_is_shown_source_by_source(page_text: str) -> None:
    section = page_text.split("<h2>Calibration</h2>")[1].split("</section>")[0]
    rows = re.findall(r"<tr[^>]*><th scope=\"row\">(.*?)</th>(.*?)</tr>", section)
    cells = {name: re.findall(r"<td[^>]*>(.*?)</td>", row) for name, row in reversed(rows) if row.count("<td") == 5}
    assert {html.unescape(name): row for name, row in cells.items()} == {
        "english": ["2", "600", "5.40", "9", "12.5 %"],
        "<b>code</b>": ["2", "334", "3.01", "9", "12.5 %"],
        "deutsch": ["2", "300", "2.70", "9", "12.5 %"],
        WHOLE: ["6", "1,234", "4.50", "9", "12.5 %"],
    }
    every = [name for name, row in rows if row.count("<td") == 4 and re.search(r"\d\.\d{5}</td>", row)]
    assert [every.count(name) for name in cells] == [3] * 4
    text = HtmlPage(page_text).text
    assert "chosen for 4.40 bytes per patch; it gives 4.50, as near as multiples of 1/32 nat come." in text
    labels = [value for tag, name, value in HtmlPage(page_text).attributes if (tag, name) == ("svg", "aria-label")]
    names = "english, <b>code</b>, deutsch, whole sample"
    assert f"Threshold and mean patch size: bytes per patch over threshold (nats); lines: {names}" in labels
    assert f"Threshold and one-byte patches: % of patches over threshold (nats); lines: {names}" in labels


def test_calibration_charts_mark_the_chosen_threshold(calibration: Calibration) -> None:
    mean, share = calibration_charts(calibration)
    for chart in (mean, share):
        assert [line.name for line in chart.lines] == ["english", "<b>code</b>", "deutsch", WHOLE]
        assert len({line.style for line in chart.lines}) == 4
        vertical, horizontal = chart.rules
        assert {line.markers[1][0] for line in chart.lines} == {vertical.x}
        assert vertical.x is not None
        assert chart.left < vertical.x < chart.right
        assert chart.lines[-1].markers[1][1] == horizontal.y
        assert horizontal.y is not None
        assert chart.top < horizontal.y < chart.bottom
    # Larger is higher on the canvas: english has the largest patches; the shares are equal, and fall.
    assert [line.markers[1][1] for line in mean.lines[:3]] == sorted(line.markers[1][1] for line in mean.lines[:3])
    assert share.lines[0].markers[0][1] < share.lines[0].markers[1][1] < share.lines[0].markers[2][1]
    assert share.lines[0].markers[0][2] == "english: 50 at 1"
    assert mean.is_cut
    assert not share.is_cut


def training_rows(page_text: str) -> list[list[str]]:
    """The cells of every row of a table in the section on training, as text."""
    section = page_text.split("<h2>Training</h2>")[1].split("</section>")[0]
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", section)
    return [[html.unescape(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)] for row in rows]


def test_the_account_of_a_training_is_shown(page_text: str, run_directory: Path) -> None:
    rows = training_rows(page_text)
    blt, entropy = (rows.index(row) for row in rows if row[0] == "Steps")
    assert rows[blt : blt + 8] == [
        ["Steps", "100", "4 done again, 1 try given up"],
        ["Steps kept", "95.2 %", "of all that were tried"],
        ["Time", "2 min 2 s", "from the first step to the last"],
        ["Time lost", "21.5 s", "to interruptions"],
        ["Goodput", "82.3 %", "share of the time that is not lost"],
        ["Start", "10.0 s", "from the command to the first step"],
        ["Checkpoints", "2", "training stood still 1.2 s for them"],
        ["Workers", "2 to 3", ""],
    ]
    assert [row[1] for row in rows[entropy : entropy + 8]] == [
        *("30", "100.0 %", "30.0 s", "0.0 s", "100.0 %", "4.0 s", "0", "2")
    ]
    account = account_of(read_timeline(str(run_directory / "model")))
    assert f"{100 * account.goodput:.1f} %" == "82.3 %"


def test_every_interruption_is_shown_with_its_cost(page_text: str) -> None:
    rows = training_rows(page_text)
    first = next(i for i, row in enumerate(rows) if row[0] == "Cause")
    assert rows[first + 1 : first + 5] == [
        ["failure", "40", "4", "0", "16.0", DEATH.replace("\x07", "\\x07")],
        ["growth", "70", "0", "0", "4.0", "2 -> 3 workers"],
        ["failure", "99", "0", "1", "1.5", "worker 2 died"],
        ["all", "", "4", "1", "21.5", ""],
    ]
    assert len([row for row in rows if row[0] == "Cause"]) == 1
    assert HtmlPage(page_text).text.count("Entropy model: no interruption.") == 1
    assert "BLT: no interruption." not in page_text


def test_the_speed_of_a_training_is_shown(page_text: str) -> None:
    rows = training_rows(page_text)
    speeds = [rows[i : i + 6] for i, row in enumerate(rows) if row[0] == "Bytes/s"]
    assert [row[:2] for row in speeds[0]] == [
        ["Bytes/s", "34.6 kB/s"],
        ["Patches/s", "7,654"],
        ["Step", "0.25 s"],
        ["MFU", "31.2 %"],
        ["Data wait", "0.25 %"],
        ["Memory", "500.0 MB"],
    ]
    assert [row[0] for row in speeds[1][:2]] == ["Bytes/s", "Step"]  # to an entropy model every byte is a patch


def test_interruptions_are_marked_where_they_came(run_directory: Path) -> None:
    blt, entropy = training_views(read_run(run_directories(str(run_directory))))
    assert [chart.title.partition(": ")[2] for chart in blt.charts] == [
        *("bits per byte", "loss", "seconds per step", "workers")
    ]
    for chart in blt.charts:
        assert [mark.title.partition(":")[0] for mark in chart.marks] == [
            *("failure after step 40", "growth after step 70", "failure after step 99")
        ]
        places = [mark.x for mark in chart.marks]
        assert places == sorted(places)
        assert chart.left < places[0] < places[-1] <= chart.right
        share = (places[1] - places[0]) / (chart.right - chart.left)
        assert share == pytest.approx((70 - 40) / 100, abs=0.01)  # both axes begin near 0 and end at 100
        assert chart.mark_name == "interruption"
    assert {chart.marks for chart in entropy.charts} == {()}
    workers = blt.charts[3]
    assert [title.partition(" at ")[0] for _, _, title in workers.lines[0].markers] == [
        *("workers: 3", "workers: 3", "workers: 2", "workers: 2", "workers: 3", "workers: 3")
    ]
    assert [tick.text for tick in workers.y_ticks] == ["0", "1", "2", "3"]


def test_interruptions_at_one_place_are_one_mark_and_many_are_folded(run_directory: Path, tmp_path: Path) -> None:
    run, entries = read_run(run_directories(str(run_directory))), list[Entry]([Started(at=0.0)])
    for number in range(30):
        entries += [*steps_made(number + 1, number + 1, 10.0 * number, workers=2), Event(at=0.0, cause="hang")]
    entries += steps_made(10_000, 10_000, 400.0, workers=2)
    copy = shutil.copytree(run_directory / "model", tmp_path / "model")
    shutil.rmtree(copy / "timeline")
    write_timeline(copy, entries)
    history = read_history(str(copy))
    assert history is not None
    view = training_view("BLT", run.metrics["model"], history, {}, with_patches=True)
    assert len(view.interruptions) == 30
    pace = view.charts[2]
    assert len(pace.marks) < 10
    assert sum(mark.title.count("hang after step") for mark in pace.marks) == 30
    report.run(report.Config(model=str(copy), output=str(tmp_path / "report.html")))
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<summary>30 interruptions of the BLT</summary>" in text
    assert HtmlPage(text).open == []


def test_a_training_without_a_timeline_has_no_account(run_directory: Path, tmp_path: Path) -> None:
    """As those of earlier versions."""
    copy, output = shutil.copytree(run_directory / "model", tmp_path / "model"), tmp_path / "report.html"
    config = report.Config(model=str(copy), output=str(output))
    assert report.run(config).status == "done"
    assert "interruption" in output.read_text(encoding="utf-8")
    shutil.rmtree(copy / "timeline")
    assert report.run(config).status == "done"
    text = output.read_text(encoding="utf-8")
    assert "BLT: loss" in text
    assert "interruption" not in text
    assert "Goodput" not in text
    assert [row[0] for row in training_rows(text)][:2] == ["Bytes/s", "Patches/s"]


def test_a_broken_timeline_is_named(run_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = shutil.copytree(run_directory / "model", tmp_path / "model")
    (copy / "timeline" / "00000000.jsonl").write_text("{}\n")
    assert main(["report", f"model={copy}", f"output={tmp_path / 'report.html'}"]) == 1
    assert "timeline/00000000.jsonl: is not a timeline" in capsys.readouterr().err


def test_few_of_many_sources_are_drawn(calibration: Calibration) -> None:
    (first, *_), count = calibration.sources, len(STYLES) + 3
    many = tuple(dataclasses.replace(first, source=f"s{i}", sample_bytes=100 + i) for i in range(count))
    drawn = drawn_sources(dataclasses.replace(calibration, sources=many))
    assert [part.source for part in drawn] == [f"s{i}" for i in range(count - 1, 3, -1)]
    for sources in ((first,), ()):
        one = dataclasses.replace(calibration, sources=sources)
        assert [[line.name for line in chart.lines] for chart in calibration_charts(one)] == [[WHOLE], [WHOLE]]


def test_every_style_of_a_line_has_its_colour_in_every_scheme() -> None:
    css = (TEMPLATES / "page.css").read_text(encoding="utf-8")
    for style in STYLES:
        assert len(re.findall(rf"--{style}: #[0-9a-f]{{6}};", css)) == 3  # light, dark and on paper
        assert f".chart .{style} {{ color: var(--{style}); }}" in css
        assert f".legend .{style}::before {{ border-color: var(--{style}); }}" in css


def test_lengths_of_the_whole_dataset(run_directory: Path) -> None:
    root = str(run_directory / "patches")
    manifest, seen = read_manifest(root), []
    lengths = patch_lengths(root, manifest, seen.append)
    assert lengths.patches == sum(shard.patches or 0 for shard in manifest.shards)
    assert sum(n * count for n, count in enumerate(lengths.counts)) == manifest.bytes == sum(seen)
    assert lengths.longest == lengths.quantile(1.0) == 32
    assert lengths.counts[0] == 0


@pytest.mark.parametrize(("offset", "num_bytes"), [(0, 1), (100, 50), (len(HOSTILE) - 1, 500), (5, 10_000)])
def test_passage_is_of_whole_patches(run_directory: Path, offset: int, num_bytes: int) -> None:
    root = str(run_directory / "patches")
    name = "valid/shard-00000.parquet:1"
    passage = read_passage(root, read_manifest(root), num_bytes=num_bytes, document=name, offset=offset)
    assert passage is not None
    assert passage.starts[0]
    assert passage.before + passage.text == HOSTILE[: passage.offset + len(passage.text)]
    assert passage.offset <= offset
    assert passage.offset + len(passage.text) >= min(offset + num_bytes, len(HOSTILE))


def test_made_again_only_if_something_changed(run_directory: Path, tmp_path: Path) -> None:
    copy, output = shutil.copytree(run_directory, tmp_path / "run"), tmp_path / "report.html"
    config = report.Config(run=str(copy), output=str(output))
    assert [report.run(config).status for _ in range(2)] == ["done", "skipped"]
    before = output.read_bytes()
    (copy / "sample" / "sample.json").unlink()
    assert report.run(config).status == "done"
    assert output.read_bytes() != before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("part", COMMANDS)
def test_a_part_alone_has_a_report(run_directory: Path, tmp_path: Path, part: str) -> None:
    output = tmp_path / "report.html"
    report.run(report.Config(output=str(output), **{part: str(run_directory / part)}))
    page = HtmlPage(output.read_text(encoding="utf-8"))
    assert page.open == []
    assert f"blt {COMMANDS[part]}" in page.text
    if part == "patches":
        assert "entropy curve (no entropy model)" in page.text


def test_another_entropy_model_draws_no_curve(run_directory: Path, tmp_path: Path) -> None:
    copy, output = shutil.copytree(run_directory, tmp_path / "run"), tmp_path / "report.html"
    config = copy / "entropy_model" / "model" / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"fingerprint": "0" * 64}))
    report.run(report.Config(run=str(copy), output=str(output)))
    text = output.read_text(encoding="utf-8")
    assert "is not the entropy model that made the patches" in text
    assert " nats · patch of" not in text


@pytest.mark.parametrize(
    ("settings", "code", "message"),
    [
        (["run=nothing"], 1, "run nothing holds nothing to report"),
        (["patches=nothing"], 1, "patches nothing holds nothing of `blt patch`"),
        ([], 2, 'key "run" must be given'),
        (["run=x", "passage_bytes=0"], 2, "passage_bytes"),
        (["run={run}", "passage_document=none"], 2, 'passage_document "none" is not in'),
        (["run={run}", "passage_offset=99999"], 2, "passage_offset 99999 is beyond"),
    ],
)
def test_what_is_wrong_is_one_line(
    run_directory: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    settings: list[str],
    code: int,
    message: str,
) -> None:
    settings = [setting.format(run=run_directory) for setting in settings]
    assert main(["report", *settings, f"output={tmp_path / 'report.html'}"]) == code
    errors = capsys.readouterr().err
    assert message in errors
    assert "Traceback" not in errors


def test_broken_file_is_named(run_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = shutil.copytree(run_directory, tmp_path / "run")
    (copy / "evaluation" / "evaluation.json").write_text("{")
    assert main(["report", f"run={copy}", f"output={tmp_path / 'report.html'}"]) == 1
    assert "evaluation/evaluation.json" in capsys.readouterr().err


def test_terminal_shows_the_rows_of_the_page(run_directory: Path, page_text: str) -> None:
    run, text = read_run(run_directories(str(run_directory))), io.StringIO()
    print_summary(str(run_directory), Console(file=text, width=120))
    page = HtmlPage(page_text).text
    for row in summary_rows(run):
        assert row.value in text.getvalue()
        assert row.value in page
    assert [row.command for row in stage_rows(run)] == [*COMMANDS.values(), "all"]
    total = math.fsum(10.5 * index for index in range(1, 8))
    assert f"{total:,.1f}" in text.getvalue()
    assert "the <i>Union</i> & \\x07 the Congress" in text.getvalue()


def test_offset_beyond_is_a_configuration_error(run_directory: Path) -> None:
    root = str(run_directory / "patches")
    with pytest.raises(ConfigError, match="beyond"):
        read_passage(root, read_manifest(root), num_bytes=5, offset=10**6)


@pytest.mark.s3
def test_a_run_on_s3_has_the_page_of_the_same_run_here(run_directory: Path, s3: S3Server, tmp_path: Path) -> None:
    """Finished, and as it is while the BLT trains: no record, no model, half a line of metrics."""
    here, there = tmp_path / "run", s3.url("reported/run")
    shutil.copytree(run_directory, here)
    finished = report_text(str(here), tmp_path)
    upload(here, there)
    assert report_text(there, tmp_path) == finished
    assert "Entropy" in finished
    for path in ("job.json", "model/config.json"):
        (here / "model" / path).unlink(missing_ok=True)
        Storage(there).delete(f"model/{path}")
    with (here / "model/metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 101, "train/b')
    upload(here, there)
    running = report_text(there, tmp_path)
    assert running == report_text(str(here), tmp_path)
    assert running != finished
    assert report.run(report.Config(run=there, output=s3.url("reported/page.html"), title="t")).status == "done"
    assert Storage(s3.url("reported")).exists("page.html")


def upload(directory: Path, uri: str) -> None:
    """Every file below the directory to the same place below the URI."""
    for file in directory.rglob("*"):
        if file.is_file():
            Storage(uri).write_replace(file.relative_to(directory).as_posix(), file.read_bytes())


def report_text(run: str, directory: Path) -> str:
    """The page about a run without what tells where the run lies."""
    output = directory / "report.html"
    output.unlink(missing_ok=True)
    report.run(report.Config(run=run, output=str(output), title="t"))
    text = output.read_text(encoding="utf-8").replace(run, "RUN")
    return re.sub(r"[0-9a-f]{64}", "HASH", text)
