"""Segment reductions against loops over the segments, with gradients; empty segments, ties and single rows."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from blt.segments import gather_rows, max_rows, softmax_rows, sum_rows

Reduction = Callable[[Tensor, Tensor, int], Tensor]


def by_loop(reduce: Callable[[Tensor], Tensor]) -> Reduction:
    def reduction(rows: Tensor, index_N: Tensor, num_segments: int) -> Tensor:
        empty = torch.zeros(rows.shape[1:], dtype=rows.dtype)
        members = [rows[index_N == segment] for segment in range(num_segments)]
        return torch.stack([reduce(part) if len(part) else empty for part in members])

    return reduction


def softmax_by_loop(rows: Tensor, index_N: Tensor, num_segments: int) -> Tensor:
    out = torch.zeros_like(rows)
    for segment in range(num_segments):
        out[index_N == segment] = torch.softmax(rows[index_N == segment], 0)
    return out


CASES: dict[str, tuple[Reduction, Reduction]] = {
    "sum": (sum_rows, by_loop(lambda part: part.sum(0))),
    "max": (max_rows, by_loop(lambda part: part.amax(0))),
    "softmax": (softmax_rows, softmax_by_loop),
}


@st.composite
def segments(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    """Rows [N,3] or [N,2,3], runs of an index; values from few numbers half of the time, so that maxima tie."""
    num_segments = draw(st.integers(1, 9))
    index = sorted(draw(st.lists(st.integers(0, num_segments - 1), min_size=1, max_size=30)))
    shape = draw(st.sampled_from([(len(index), 3), (len(index), 2, 3)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    rows = torch.randn(shape, generator=generator, dtype=torch.float64) * 3
    return rows.round() if draw(st.booleans()) else rows, torch.tensor(index), num_segments


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=60)
@given(segments())
def test_reductions(name: str, case: tuple[Tensor, Tensor, int]) -> None:
    """Values to 1e-12; gradients too, where torch's amax also shares evenly among ties."""
    fast_of, slow_of = CASES[name]
    rows, index_N, num_segments = case
    rows.requires_grad_()
    fast, slow = fast_of(rows, index_N, num_segments), slow_of(rows, index_N, num_segments)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-12)
    weight = torch.randn(fast.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (ours,), (theirs,) = torch.autograd.grad(fast, rows, weight), torch.autograd.grad(slow, rows, weight)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@settings(max_examples=40)
@given(segments())
def test_gather_rows(case: tuple[Tensor, Tensor, int]) -> None:
    rows, index_N, num_segments = case
    table = torch.randn(num_segments, *rows.shape[1:], dtype=torch.float64, requires_grad=True)
    fast, slow = gather_rows(table, index_N), table[index_N]
    assert torch.equal(fast, slow)
    (ours,), (theirs,) = torch.autograd.grad(fast, table, rows), torch.autograd.grad(slow, table, rows)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_empty_segments_give_zero_and_take_no_gradient() -> None:
    rows = torch.tensor([[-5.0], [-3.0]], requires_grad=True)
    out = max_rows(rows, torch.tensor([1, 1]), 3)
    assert out.tolist() == [[0.0], [-3.0], [0.0]]
    out.backward(torch.tensor([[7.0], [1.0], [7.0]]))
    assert rows.grad is not None
    assert rows.grad.tolist() == [[0.0], [1.0]]


def test_ties_share_the_gradient() -> None:
    rows = torch.tensor([[2.0], [2.0], [1.0], [2.0]], requires_grad=True)
    max_rows(rows, torch.tensor([0, 0, 0, 0]), 1).sum().backward()
    assert rows.grad is not None
    torch.testing.assert_close(rows.grad, torch.tensor([[1.0], [1.0], [0.0], [1.0]]) / 3)


def test_softmax_of_large_scores() -> None:
    """Each segment is shifted by its own largest score."""
    scores = torch.tensor([[1e4], [1e4 - 1], [-1e4], [-1e4 - 1]])
    weights = softmax_rows(scores, torch.tensor([0, 0, 1, 1]), 2)
    expected = torch.softmax(torch.tensor([0.0, -1.0]), 0)
    torch.testing.assert_close(weights[:, 0], expected.repeat(2), rtol=1e-3, atol=0)


def test_bfloat16_keeps_its_dtype() -> None:
    rows = torch.randn(6, 4).bfloat16().requires_grad_()
    index_N = torch.tensor([0, 0, 1, 2, 2, 2])
    for reduction, _ in CASES.values():
        out = reduction(rows, index_N, 3)
        assert out.dtype == torch.bfloat16
        (grad,) = torch.autograd.grad(out.float().sum(), rows)
        assert torch.isfinite(grad).all()
