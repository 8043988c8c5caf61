"""`blt inspect`: the patches of blt.patching in the terminal, on the page and at any place of its slider."""

import base64
import dataclasses
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import struct
import subprocess
import threading
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from blt.checkpoint import load, save_entropy_model, save_language_model
from blt.entropy_model import EntropyModel, document_entropies
from blt.patching import PatchRule, document_patch_starts, quantize_entropies, stored_entropies
from jobs.command_line import main
from jobs.inspect_page import inspection_page, slider
from jobs.inspect_terminal import HEIGHTS, print_inspection
from jobs.page import TEMPLATES
from jobs.patched_text import Patch, PatchedText
from jobs.patcher import load_patcher
from jobs.shown_text import PATCH_BORDER
from pipelines.model_files import store_model
from pipelines.storage import Storage
from tests.jobs.html_page import HtmlPage
from tests.jobs.report_case import HOSTILE
from tests.s3_server import S3Server
from tests.small_language_model import save_small_language_model, small_language_model

NASTY = (
    HOSTILE[:200]
    + b"</script><script>window.pwned=1</script> <!-- ]]> ' \" ` \\ {{ 7*7 }} {% x %} "
    + "\u2028\u2029 \ufeff \ufffd".encode()
    + bytes(range(256))
    + "é日本 😀 e\u0301\u200d\u202e".encode()
    + b" \xe6\x97"
)
"""Markup, templates, every byte, marks that join or turn text, and a character that is cut off."""
TEXTS = [b"a", b"a plain line\nand another one\n", NASTY]
NODE = shutil.which("node")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories of a BLT, of its entropy model alone, and of one whose rule needs none."""
    root, lm = tmp_path_factory.mktemp("inspect"), small_language_model()
    entropies = entropies_of(lm.entropy_model, NASTY)
    rule = PatchRule(threshold=float(entropies.quantile(0.7)), max_patch_length=6)
    save_language_model(dataclasses.replace(lm, patch_rule=rule), root / "blt")
    assert lm.entropy_model is not None
    save_entropy_model(lm.entropy_model, root / "entropy")
    save_small_language_model(root / "space", PatchRule(kind="space"))
    (root / "text").write_bytes(NASTY)
    return root


def entropies_of(model: EntropyModel | None, text: bytes) -> torch.Tensor:
    assert model is not None
    return document_entropies(model, [text])[0]


def inspected(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, dict[str, Any]]:
    """What the command printed before its last line, and that."""
    assert main(["inspect", *arguments]) == 0
    shown, result = capsys.readouterr().out.rstrip("\n").rsplit("\n", 1)
    return shown, json.loads(result)


def patched(models: Path, text: bytes, **changes: Any) -> PatchedText:
    patcher = load_patcher(str(models / "blt"))
    return dataclasses.replace(patcher, rule=dataclasses.replace(patcher.rule, **changes)).patch(text)


def patched_text(text: bytes, starts: list[bool], entropies: torch.Tensor, rule: PatchRule) -> PatchedText:
    return PatchedText(
        text=text,
        starts=tuple(starts),
        entropies=tuple(entropies[: len(text)].tolist()),
        rule=rule,
        reset_on_newline=False,
    )


def in_order(text: PatchedText) -> list[Patch]:
    return sorted(text.longest(text.num_patches), key=lambda patch: patch.first)


def text_lines(shown: str) -> list[str]:
    """The lines of text in what is printed, without those of entropies."""
    lines = shown.splitlines()
    lines = lines[: next(i for i, line in enumerate(lines) if line.startswith(f"{PATCH_BORDER} opens a patch"))]
    return [line for line in lines if not set(line) <= {*HEIGHTS, " "}]


def test_figures_are_those_of_the_rule(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, page = tmp_path / "nasty.bin", tmp_path / "deep" / "page.html"
    file.write_bytes(NASTY)
    shown, result = inspected(capsys, f"model={models / 'blt'}", str(file), "--html", str(page))
    lm = load(models / "blt")
    entropies = entropies_of(lm.entropy_model, NASTY)
    starts = document_patch_starts(NASTY, entropies, lm.patch_rule)[:-1]
    assert 1 < int(starts.sum()) < len(NASTY)
    assert (result["bytes"], result["patches"], result["left_out_bytes"]) == (len(NASTY), int(starts.sum()), 0)
    assert result["mean_patch_bytes"] == round(len(NASTY) / int(starts.sum()), 4)
    assert result["threshold"] == lm.patch_rule.threshold
    assert result["mean_entropy_nats"] == pytest.approx(float(entropies[:-1].mean()), abs=1e-4)
    assert result["longest_patch_bytes"] == 6
    assert result["path"] == str(page)
    assert str(file) in shown
    assert HtmlPage(page.read_text(encoding="utf-8")).passage() == NASTY


def test_plain_text_marks_every_patch(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "first line é\nsecond, longer: " + "words and words " * 9
    shown, _ = inspected(capsys, f"model={models / 'blt'}", text)
    joined = "".join(text_lines(shown))
    expected = patched(models, text.encode())
    patches = [patch.data.decode("utf-8", "backslashreplace").replace("\n", "↵") for patch in in_order(expected)]
    assert joined == "".join(PATCH_BORDER + patch for patch in patches)
    assert max(map(len, text_lines(shown))) <= 80
    assert "\x1b" not in shown


def test_what_is_no_text_is_shown_as_escapes(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "raw").write_bytes(b"\x1b[31m\xff\x00\x7f\xe2\x80\xae")
    shown, _ = inspected(capsys, f"model={models / 'blt'}", str(tmp_path / "raw"))
    text = "".join(text_lines(shown)).replace(PATCH_BORDER, "")
    assert text == r"\x1b[31m\xff\x00\x7f\xe2\x80\xae"
    assert not {"\x1b", "\x00", "\x7f", "\u202e"} & set(shown)


@pytest.mark.parametrize(("no_color", "term"), [(False, "xterm"), (True, "xterm"), (False, "dumb")])
def test_colours_only_where_the_terminal_takes_them(
    models: Path, monkeypatch: pytest.MonkeyPatch, no_color: bool, term: str
) -> None:
    monkeypatch.setenv("TERM", term)
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    terminal, text = io.StringIO(), patched(models, b"one line of plain text", max_patch_length=3)
    console = Console(file=terminal, force_terminal=True, width=100)
    print_inspection(console, text, "it", None, print_bytes=100, longest=0)
    first = terminal.getvalue().splitlines()[0]
    backgrounds = re.findall(r"\x1b\[30;(4\d)m([^\x1b]*)", first)
    if no_color or term == "dumb":
        assert backgrounds == []
        assert first.count(PATCH_BORDER) == text.num_patches
    else:
        assert PATCH_BORDER not in first
        runs = ["".join(part for _, part in run) for _, run in itertools.groupby(backgrounds, lambda found: found[0])]
        assert runs == [patch.data.decode() for patch in in_order(text)]
        assert len(runs) > 4


@pytest.mark.parametrize(
    "text", ['"quoted" from the first letter', "null", "'", "nowhere/to/be found.txt", "", "a\udcffb"]
)
def test_a_text_is_taken_as_it_stands(models: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    shown, result = inspected(capsys, f"model={models / 'blt'}", text)
    data = text.encode("utf-8", "surrogateescape")
    assert result["bytes"] == len(data)
    assert "text of the command line" in shown
    assert "".join(text_lines(shown)).replace(PATCH_BORDER, "") == data.decode("utf-8", "backslashreplace")


def test_standard_input(models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"piped \xff")))
    shown, result = inspected(capsys, f"model={models / 'blt'}", "-")
    assert result["bytes"] == 7
    assert "standard input" in shown


def test_a_long_input_is_cut_and_says_so(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, page = tmp_path / "long.txt", tmp_path / "page.html"
    file.write_bytes(NASTY * 3)
    arguments = [f"model={models / 'blt'}", str(file), "--max-bytes", "100", "print_bytes=30", "--html", str(page)]
    shown, result = inspected(capsys, *arguments)
    told = f"Left out: {3 * len(NASTY) - 100:,} bytes after the first 100 (max_bytes)"
    assert told in shown
    assert told in HtmlPage(page.read_text(encoding="utf-8")).text
    assert "... 70 bytes more, not shown here (print_bytes)" in shown
    assert (result["bytes"], result["left_out_bytes"]) == (100, 3 * len(NASTY) - 100)
    whole = patched(models, NASTY * 3)
    assert HtmlPage(page.read_text(encoding="utf-8")).passage() == NASTY[:100]
    assert result["patches"] == sum(whole.starts[:100])  # what follows has no say in what stands before it


def test_a_stream_is_not_read_to_its_end(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    stopped = threading.Event()

    def write_for_ever() -> None:
        try:
            with pipe.open("wb", buffering=0) as file:
                while True:
                    file.write(b"y\n" * 1000)
        except BrokenPipeError:
            stopped.set()

    writer = threading.Thread(target=write_for_ever)
    writer.start()
    shown, result = inspected(capsys, f"model={models / 'blt'}", str(pipe), "max_bytes=50")
    writer.join(30)
    assert stopped.is_set()
    assert (result["bytes"], result["left_out_bytes"]) == (50, None)
    assert "Left out: an unknown number of bytes after the first 50 (max_bytes)" in shown


def test_an_entropy_model_alone_takes_a_threshold_or_a_rule(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threshold = load(models / "blt").patch_rule.threshold
    text = NASTY.decode("utf-8", "surrogateescape").replace("\0", "")
    own = inspected(capsys, f"model={models / 'blt'}", text)[1]
    alone = inspected(
        capsys, f"model={models / 'entropy'}", text, f"rule.threshold={threshold!r}", "rule.max_patch_length=6"
    )[1]
    assert alone == own | {"seconds": alone["seconds"]}
    uncut = inspected(capsys, f"model={models / 'entropy'}", text, "--threshold", repr(threshold))[1]
    assert uncut["patches"] < own["patches"]
    assert inspected(capsys, f"model={models / 'blt'}", text, "threshold=99")[1]["longest_patch_bytes"] == 6


def test_a_newline_resets_where_it_is_asked_for(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "some words\nsome words\nsome words"
    means = [
        inspected(capsys, f"model={models / 'blt'}", text, *reset)[1]["mean_entropy_nats"]
        for reset in ((), ("reset_on_newline=false",), ("reset_on_newline=true",))
    ]
    assert means[0] == means[1] != means[2]


def test_a_rule_without_entropies_needs_no_model_of_them(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    shown, result = inspected(capsys, f"model={models / 'space'}", "three small words", "--html", str(page))
    assert result["patches"] == 3
    assert not {"mean_entropy_nats", "threshold"} & set(result)
    assert not set(HEIGHTS) & set(shown)
    text = page.read_text(encoding="utf-8")
    assert "No slider: the rule is of kind space" in HtmlPage(text).text
    assert "<svg" not in text
    # With the entropy model at hand the curve is there, whatever the rule.
    shown, _ = inspected(capsys, f"model={models / 'entropy'}", "three small words", "rule.kind=space")
    assert set(HEIGHTS) & set(shown)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["model={models}/nowhere", "x"], 1, "nowhere/config.json"),
        (["model={models}/entropy", "x"], 2, "is an entropy model alone: give threshold, or a rule"),
        (["model={models}/space", "x", "rule.kind=entropy"], 2, "was saved without the entropy model"),
        (["model={models}/space", "x", "threshold=1"], 2, "threshold is for rules of kind entropy"),
        (["model={models}/blt", "x", "threshold=.nan"], 2, "threshold"),
        (["model={models}/blt", "x", "max_bytes=0"], 2, 'key "max_bytes" must be at least 1'),
        (["model={models}/blt"], 2, 'key "input" is missing'),
        (["model={models}/blt", "two", "words"], 2, "one argument too many"),
        (["model={models}/blt", "{models}/text", "--html", "{models}/blt/../text"], 2, "is the input itself"),
    ],
)
def test_what_is_wrong_is_one_line(
    models: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, message: str
) -> None:
    assert main(["inspect", *(argument.format(models=models) for argument in arguments)]) == status
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1


def test_another_entropy_model_is_refused(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = shutil.copytree(models / "blt", tmp_path / "blt")
    config = copy / "config.json"
    values = json.loads(config.read_text())
    values["entropy_model"]["fingerprint"] = "0" * 64
    config.write_text(json.dumps(values))
    assert main(["inspect", f"model={copy}", "x"]) == 1
    assert "is not the entropy model" in capsys.readouterr().err


def page_of(text: PatchedText, left_out: str | None = None) -> str:
    return inspection_page(text, "a <b>name</b>\x1b", left_out, longest=3)


def test_the_page_loads_nothing_and_runs_its_own_script_alone(models: Path) -> None:
    text = page_of(patched(models, NASTY))
    page = HtmlPage(text)
    assert page.open == []
    assert page.passage() == NASTY
    assert "a <b>name</b>\\x1b" in page.text
    links = [value for _, name, value in page.attributes if name in ("src", "href", "srcset", "data", "action")]
    assert links == ["data:,"]
    assert not re.search(r"https?:|//[a-z]|@import|url\(", text.replace("// ", ""))
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    scripts = re.findall(r"<script[^>]*>(.*?)</script", text, re.DOTALL)
    assert scripts == ["".join((TEMPLATES / name).read_text() for name in ("patches.js", "inspect.js"))]
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    policy = next(value for tag, name, value in page.attributes if name == "content" and "default-src" in value)
    assert policy.split("; ")[0] == "default-src 'none'"
    assert f"script-src 'sha256-{digest}'" in policy.split("; ")
    assert "7*7" in page.text


def slider_data(text: str) -> dict[str, str]:
    return {name: value for _, name, value in HtmlPage(text).attributes if name.startswith("data-")}


@pytest.mark.parametrize("quantized", [False, True])
def test_the_page_has_every_bit_of_the_entropies(models: Path, quantized: bool) -> None:
    found = patched(models, NASTY, quantized=quantized)
    data = slider_data(page_of(found))
    entropies = entropies_of(load(models / "blt").entropy_model, NASTY)[:-1]
    if quantized:
        entropies = stored_entropies(quantize_entropies(entropies))
    sent = struct.unpack(f"<{len(NASTY)}f", base64.b64decode(data["data-nats"]))
    assert torch.equal(torch.tensor(sent), entropies)
    assert float(data["data-threshold"]) == found.rule.threshold
    assert data["data-max-patch-length"] == "6"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"monotonic": True, "threshold": 0.01}, "the rule compares the rise of the entropy, not the entropy itself"),
        ({"threshold_add": 0.1}, "the rule demands a rise of the entropy besides the threshold"),
        ({"kind": "top_k", "patch_size": 4}, "the rule is of kind top_k"),
        ({"kind": "fixed", "patch_size": 4}, "the rule is of kind fixed"),
        ({"threshold": float("inf")}, "the threshold is inf"),
    ],
)
def test_no_slider_for_a_rule_that_it_cannot_follow(models: Path, changes: dict[str, Any], reason: str) -> None:
    text = page_of(patched(models, NASTY, **changes))
    assert f"No slider: {reason}" in HtmlPage(text).text
    assert slider_data(text) == {}
    assert HtmlPage(text).passage() == NASTY


def test_an_empty_text_has_a_page(models: Path) -> None:
    page = HtmlPage(page_of(patched(models, b"")))
    assert page.passage() == b""
    assert "No slider: there is no text" in page.text


@pytest.mark.skipif(NODE is None, reason="node is not installed")
def test_the_script_cuts_as_the_rules_do(models: Path) -> None:
    """The page's own functions, on what the page is given, against blt.patching."""
    cases: list[dict[str, object]] = []
    expected: list[list[int]] = []
    for text in TEXTS:
        entropies = entropies_of(load(models / "blt").entropy_model, text)
        exact = [float(value) for value in entropies.quantile(torch.tensor([0.0, 0.3, 0.5, 0.7, 1.0]))]
        thresholds = [*exact, *(value + 1e-8 for value in exact), -1.0, 0.0, 2.5, 163 / 32, 99.0]
        for threshold, quantized, longest in itertools.product(thresholds, (False, True), (None, 1, 5)):
            rule = PatchRule(threshold=threshold, max_patch_length=longest, quantized=quantized)
            starts = document_patch_starts(text, entropies, rule)[:-1].tolist()
            compared = stored_entropies(quantize_entropies(entropies)) if quantized else entropies
            given = slider(patched_text(text, starts, compared, rule))
            assert given is not None
            cases.append(dataclasses.asdict(given))
            expected.append([int(starts_patch) for starts_patch in starts])
    script = (
        (TEMPLATES / "patches.js").read_text(encoding="utf-8")
        + """
        const cases = JSON.parse(require("fs").readFileSync(0, "utf-8"));
        const cut = (c) => patchStarts(float32s(c.nats), c.threshold, c.max_patch_length);
        const starts = cases.map(cut);
        const lengths = starts.map((one) => [...patchLengths(one)]);
        process.stdout.write(JSON.stringify({ starts: starts.map((one) => [...one]), lengths }));
    """
    )
    assert NODE is not None
    done = subprocess.run([NODE, "-e", script], input=json.dumps(cases), capture_output=True, text=True, check=True)
    found_by_script = json.loads(done.stdout)
    assert found_by_script["starts"] == expected
    assert len({tuple(starts) for starts in expected}) > 20
    for starts, lengths in zip(expected, found_by_script["lengths"], strict=True):
        borders = [i for i, one in enumerate(starts) if one] + [len(starts)]
        assert lengths == [b - a for a, b in itertools.pairwise(borders) for _ in range(b - a)]


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="chromium is not installed")
@pytest.mark.parametrize("quantile", [0.2, 0.9])
def test_a_moved_slider_leaves_the_page_that_the_threshold_would_have_made(
    models: Path, tmp_path: Path, quantile: float
) -> None:
    """In a browser: classes and peaks after the script cut the text again are those that Python writes."""
    own = patched(models, NASTY, max_patch_length=None)
    assert own.entropies is not None
    threshold = round(float(torch.tensor(own.entropies).quantile(quantile)), 3)
    page = tmp_path / "page.html"
    page.write_text(page_of(own), encoding="utf-8")
    command = [
        *(str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *(f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--dump-dom"),
        f"{page.as_uri()}#threshold={threshold}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    moved = HtmlPage(done.stdout)
    wanted = patched(models, NASTY, max_patch_length=None, threshold=threshold)
    expected = HtmlPage(page_of(wanted))

    def marks(found: HtmlPage) -> list[tuple[str, str]]:
        return [(tag, value) for tag, name, value in found.attributes if (tag, name) in (("i", "class"), ("path", "d"))]

    assert marks(moved) == marks(expected)
    assert marks(moved) != marks(HtmlPage(page_of(own)))
    assert f"{wanted.num_patches:,} patches, mean {len(NASTY) / wanted.num_patches:.3f} bytes" in moved.text


@pytest.mark.s3
def test_model_text_and_page_on_s3(models: Path, s3: S3Server, capsys: pytest.CaptureFixture[str]) -> None:
    root = s3.url(uuid.uuid4().hex)
    store_model(models / "blt", f"{root}/model")
    Storage(root).write_replace("nasty.bin", NASTY)
    arguments = [f"model={root}/model", f"{root}/nasty.bin", "--max-bytes", "300", "--html", f"{root}/page.html"]
    _, result = inspected(capsys, *arguments)
    assert (result["bytes"], result["left_out_bytes"]) == (300, len(NASTY) - 300)
    assert HtmlPage(Storage(root).read_bytes("page.html").decode()).passage() == NASTY[:300]
