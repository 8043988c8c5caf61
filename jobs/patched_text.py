"""A text with its patches and entropies, and the figures that follow from them.

Entropies are nats as the rule compares them: rounded up to multiples of 1/32 where it is quantized.
"""

import math
from dataclasses import dataclass

from blt.patching import PatchRule
from jobs.passage_layout import patch_length_at
from jobs.report_table import Row
from jobs.shown_text import visible

_SHOWN_BYTES = 60
"""Of a long patch."""
_SYMBOLS = str.maketrans({"\n": "↵", "\t": "⇥"})


@dataclass(frozen=True, kw_only=True)
class Patch:
    """A patch of the text."""

    first: int
    """Index of its first byte."""
    data: bytes

    @property
    def shown(self) -> str:
        """Its beginning in one line, with escapes for what is no text."""
        text = visible(self.data[:_SHOWN_BYTES].decode("utf-8", "backslashreplace")).translate(_SYMBOLS)
        return text + ("..." if len(self.data) > _SHOWN_BYTES else "")


@dataclass(frozen=True, kw_only=True)
class PatchedText:
    """A document, or the beginning of one, in patches; BOS and EOS are not counted."""

    text: bytes
    starts: tuple[bool, ...]
    """For each byte, whether it starts a patch."""
    entropies: tuple[float, ...] | None
    """For each byte, of the distribution that it was drawn from; None where no entropy model is at hand."""
    rule: PatchRule
    reset_on_newline: bool

    @property
    def num_patches(self) -> int:
        return sum(self.starts)

    @property
    def mean_patch_bytes(self) -> float | None:
        """None for an empty text."""
        return len(self.text) / self.num_patches if self.text else None

    @property
    def mean_nats(self) -> float | None:
        """None for an empty text, and without entropies."""
        return math.fsum(self.entropies) / len(self.entropies) if self.entropies else None

    @property
    def threshold(self) -> float | None:
        """What an entropy is compared with to decide that a patch starts; None if no entropy alone decides it."""
        plain = self.rule.kind == "entropy" and not self.rule.monotonic
        return self.rule.threshold if plain else None

    def longest(self, count: int) -> list[Patch]:
        """The longest patches, of equal ones the first."""
        lengths = patch_length_at(self.starts)
        firsts = sorted((i for i, starts in enumerate(self.starts) if starts), key=lambda i: -lengths[i])[:count]
        return [Patch(first=i, data=self.text[i : i + lengths[i]]) for i in firsts]


def figure_rows(patched: PatchedText) -> list[Row]:
    """The figures of a text, for the terminal and the page alike."""
    rows = [
        Row(label="Bytes", value=f"{len(patched.text):,}"),
        Row(label="Patches", value=f"{patched.num_patches:,}"),
    ]
    if patched.mean_patch_bytes is not None:
        (longest,) = patched.longest(1)
        rows.append(
            Row(
                label="Mean patch",
                value=f"{patched.mean_patch_bytes:.3f}",
                note=f"bytes; longest {len(longest.data):,} at {longest.first:,}",
            )
        )
    if patched.mean_nats is not None:
        assert patched.entropies is not None
        note = f"nats, from {min(patched.entropies):.3f} to {max(patched.entropies):.3f}"
        rows.append(Row(label="Mean entropy", value=f"{patched.mean_nats:.4f}", note=note))
    if patched.rule.kind == "entropy":
        note = "nats, rise of the next-byte entropy" if patched.rule.monotonic else "nats, next-byte entropy"
        rows.append(Row(label="Threshold", value=f"{patched.rule.threshold:.4f}", note=note))
    return rows
