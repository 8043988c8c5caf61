"""The page of a patched text: the text coloured by patch over its entropies, and a slider that cuts it again.

In: a `PatchedText`. Out: one HTML file that loads nothing. Its script is two files of the templates' directory and no
other may run (by its hash in the page's content security policy); text reaches it only as what the page shows, and the
entropies as float32 in base64, every bit of them, so that it decides as the rule does.
"""

import base64
import hashlib
import math
import struct
from dataclasses import dataclass

from blt.patching import ENTROPY_STEPS_PER_NAT
from jobs.page import TEMPLATES, render_page
from jobs.passage_layout import COLUMN_WIDTH, CURVE_HEIGHT, lay_out
from jobs.patched_text import PatchedText, figure_rows
from jobs.rule_text import rule_text

_TEMPLATE = "inspect.html.jinja"
_SCRIPTS = ("patches.js", "inspect.js")
_STEP_NATS = 0.01


@dataclass(frozen=True, kw_only=True)
class Slider:
    """What the script needs to cut the text as the rule does."""

    nats: str
    """For each byte, float32, lowest byte first, in base64."""
    threshold: float
    max_patch_length: int
    """0 without a limit."""
    step: float


def inspection_page(patched: PatchedText, name: str, left_out: str | None, longest: int) -> str:
    """The page of a text that is called `name`; `left_out` says in words what was not read, and of the longest patches
    `longest` are listed.
    """
    script = "".join((TEMPLATES / file).read_text(encoding="utf-8") for file in _SCRIPTS)
    return render_page(
        _TEMPLATE,
        name=name,
        rule=rule_text(patched.rule, patched.reset_on_newline),
        left_out=left_out,
        rows=figure_rows(patched),
        layout=lay_out(patched.text, patched.starts, patched.entropies, patched.threshold),
        rounded=patched.rule.quantized,
        slider=slider(patched),
        obstacle=slider_obstacle(patched),
        longest=patched.longest(longest),
        script=script,
        script_source=f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}",
        column_width=COLUMN_WIDTH,
        curve_height=CURVE_HEIGHT,
    )


def slider_obstacle(patched: PatchedText) -> str | None:
    """Why a threshold alone cannot make the patches of the rule; None if it can."""
    rule = patched.rule
    if rule.kind != "entropy":
        return f"the rule is of kind {rule.kind}, which compares no entropy with a threshold"
    if rule.monotonic:
        return "the rule compares the rise of the entropy, not the entropy itself"
    if rule.threshold_add is not None:
        return "the rule demands a rise of the entropy besides the threshold"
    if not math.isfinite(rule.threshold):
        return f"the threshold is {rule.threshold}"
    return None if patched.text else "there is no text"


def slider(patched: PatchedText) -> Slider | None:
    """What the slider needs; None where there is none to show."""
    if slider_obstacle(patched) is not None:
        return None
    assert patched.entropies is not None
    return Slider(
        nats=base64.b64encode(struct.pack(f"<{len(patched.entropies)}f", *patched.entropies)).decode(),
        threshold=patched.rule.threshold,
        max_patch_length=patched.rule.max_patch_length or 0,
        step=1 / ENTROPY_STEPS_PER_NAT if patched.rule.quantized else _STEP_NATS,
    )
