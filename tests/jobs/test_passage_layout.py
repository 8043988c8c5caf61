"""The layout of a passage: cells and words that patches do not change, every byte in its patch, the curve under it."""

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.passage_layout import COLUMN_WIDTH, NUM_COLOURS, ByteCell, Layout, lay_out


def cells_of(layout: Layout) -> list[ByteCell]:
    return [byte for word in layout.words for cell in word.cells for byte in cell.bytes]


def test_a_character_that_a_border_parts_stays_one_cell() -> None:
    layout = lay_out("a日b".encode(), [True, False, True, False, False], [5.0, 1.0, 4.5, 0.5, 2.0], 4.0, offset=100)
    (word,) = layout.words
    assert [(cell.shown, cell.kind, cell.columns, len(cell.bytes)) for cell in word.cells] == [
        ("a", "text", 1, 1),
        ("日", "text", 3, 3),
        ("b", "text", 1, 1),
    ]
    assert [(byte.colour, byte.opens, byte.closes) for byte in cells_of(layout)] == [
        (1, True, False),
        (1, False, True),
        (2, True, False),
        (2, False, False),
        (2, False, True),
    ]
    assert cells_of(layout)[1].title == "0xE6 of “日” at 101 · 1.000 nats · patch of 2 bytes"
    assert cells_of(layout)[4].title == "0x62 “b” at 104 · 2.000 nats · patch of 3 bytes"
    assert (layout.top_nats, layout.threshold_share) == (5.5, pytest.approx(4 / 5.5))
    assert word.curve == "5,9 15,82 25,18 35,91 45,64"
    assert word.peaks == "M5,9h0M25,18h0"


@pytest.mark.parametrize("threshold", [None, -1.0, 99.0, math.inf])
def test_a_threshold_that_no_entropy_meets_does_not_stretch_the_scale(threshold: float | None) -> None:
    layout = lay_out(b"ab", [True, False], [1.0, 2.0], threshold)
    assert (layout.top_nats, layout.threshold_share) == (2.5, None)
    assert lay_out(b"", [], [], 2.0).words == ()


@given(text=st.binary(max_size=80), seed=st.randoms())
def test_patches_change_colours_alone(text: bytes, seed: random.Random) -> None:
    starts = [i == 0 or seed.random() < 0.3 for i in range(len(text))]
    nats = [5 * seed.random() for _ in text]
    found, other = lay_out(text, starts, nats, None), lay_out(text, [True] * len(text), nats, None)
    shapes = [
        [[(cell.shown, cell.columns, len(cell.bytes)) for cell in word.cells] for word in layout.words]
        for layout in (found, other)
    ]
    assert shapes[0] == shapes[1]
    assert [word.curve for word in found.words] == [word.curve for word in other.words]
    cells = cells_of(found)
    assert [byte.index for byte in cells] == list(range(len(text)))
    assert [byte.opens for byte in cells] == starts
    assert [byte.closes for byte in cells] == [*starts[1:], True][: len(text)]
    for before, after in itertools.pairwise(cells):
        assert (after.colour - before.colour) % NUM_COLOURS == int(after.opens)
    for word in found.words:
        assert word.columns == sum(cell.columns for cell in word.cells) <= 24
        xs = [float(point.split(",")[0]) for point in word.curve.split()]
        assert xs == sorted(xs)
        assert xs[0] < COLUMN_WIDTH * word.columns
