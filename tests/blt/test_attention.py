"""Blocked causal attention against dense attention under a mask: spans, carried keys, gradients; rotary positions."""

from itertools import accumulate, pairwise
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from blt import attention
from blt.attention import causal_attention, causal_spans, document_starts, documents_from_eos
from blt.layers import RopeScaling, frequencies, rotate, rotations
from tests.model_cases import transformer_config
from tests.oracle import scaled_frequency

HEADS, HEAD_WIDTH = 2, 4


def dense(q: Tensor, k: Tensor, v: Tensor, mask_BTS: Tensor) -> Tensor:
    scores = torch.einsum("bthk,bshk->bhts", q, k) / q.shape[-1] ** 0.5
    weights = torch.softmax(scores.masked_fill(~mask_BTS[:, None], -torch.inf), -1)
    return torch.einsum("bhts,bshk->bthk", weights, v)


def visible(document_ids_BT: Tensor, window: int | None, carried: int) -> Tensor:
    """Bool [B,T,S]: same document (carried keys are of the row's first), j <= i, j within the window."""
    rows = []
    for documents in document_ids_BT.tolist():
        runs = list(accumulate((before != here for before, here in pairwise(documents)), initial=0))
        keys, reach = [0] * carried + runs, len(runs) + carried if window is None else window
        rows.append(
            [[key == run and i - reach < j - carried <= i for j, key in enumerate(keys)] for i, run in enumerate(runs)]
        )
    return torch.tensor(rows)


@st.composite
def spans_cases(draw: st.DrawFn) -> tuple[Tensor, int | None, int, int]:
    length = draw(st.integers(1, 40))
    rows = draw(st.integers(1, 2))
    borders = [draw(st.lists(st.booleans(), min_size=length, max_size=length)) for _ in range(rows)]
    if draw(st.booleans()):
        borders = [[border and i % 7 == 0 for i, border in enumerate(row)] for row in borders]
    document_ids = torch.tensor(borders).long().cumsum(1)
    window = draw(st.sampled_from([1, 2, 5, 16, 39, None]))
    carried = draw(st.integers(0, 20))
    return document_ids, window, carried, draw(st.sampled_from([4, 7, 16, 128]))


def inputs(rows: int, length: int, carried: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    sizes = [(rows, length), (rows, length + carried), (rows, length + carried)]
    q, k, v = (torch.randn(*size, HEADS, HEAD_WIDTH, generator=generator).to(dtype) * 2 for size in sizes)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


@settings(max_examples=80)
@given(spans_cases())
def test_equals_dense(case: tuple[Tensor, int | None, int, int]) -> None:
    """Values and gradients in float64: only the order of sums differs."""
    document_ids, window, carried, query_block = case
    q, k, v = inputs(*document_ids.shape, carried)
    with patch.object(attention, "QUERY_BLOCK", query_block):
        fast = causal_attention(q, k, v, causal_spans(document_ids, window, carried))
    slow = dense(q, k, v, visible(document_ids, window, carried))
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-12)
    weight = torch.randn(fast.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad(fast, (q, k, v), weight), torch.autograd.grad(slow, (q, k, v), weight), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize("window", [100, 128, 129, None])
def test_real_query_block(window: int | None) -> None:
    """Blocks of 128 as they are used, documents that start inside them."""
    document_ids = torch.tensor([[0] * 150 + [1] * 5 + [2] * 145, [0] * 128 + [1] * 128 + [2] * 44])
    q, k, v = inputs(2, 300, 0)
    fast = causal_attention(q, k, v, causal_spans(document_ids, window))
    torch.testing.assert_close(fast, dense(q, k, v, visible(document_ids, window, 0)), rtol=0, atol=1e-12)


def test_large_scores() -> None:
    """Scores of thousands: one key takes all; nothing overflows, forward or backward."""
    q, k, v = inputs(1, 50, 0, torch.float32)
    out = causal_attention(q * 100, k * 100, v, causal_spans(torch.zeros(1, 50, dtype=torch.int64), 20))
    out.sum().backward()
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(x.grad).all() for x in (q, k, v) if x.grad is not None)


def test_bfloat16() -> None:
    """Within bfloat16's 8 bits of float32: softmax and sums are kept wider."""
    spans = causal_spans(torch.zeros(2, 200, dtype=torch.int64), 50)
    wide = inputs(2, 200, 0, torch.float32)
    narrow = tuple(x.detach().bfloat16().requires_grad_() for x in wide)
    expected, found = causal_attention(*wide, spans), causal_attention(*narrow, spans)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.1)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad(found, narrow, weight.bfloat16())
    for ours, theirs in zip(grads, torch.autograd.grad(expected, wide, weight), strict=True):
        assert ours.dtype == torch.bfloat16
        assert float((ours.float() - theirs).norm() / theirs.norm()) < 0.02


def test_first_keys_and_positions() -> None:
    document_ids = torch.tensor([[5, 5, 5, 5, 2, 2, -1, -1]])
    spans = causal_spans(document_ids, 3)
    assert spans.first_key_BT.tolist() == [[0, 0, 0, 1, 4, 4, 6, 6]]
    assert spans.positions_BT.tolist() == [[0, 1, 2, 3, 0, 1, 0, 1]]
    spans = causal_spans(document_ids, 3, carried=2)
    assert spans.first_key_BT.tolist() == [[0, 1, 2, 3, 6, 6, 8, 8]]
    spans = causal_spans(document_ids, None, carried=2)
    assert spans.first_key_BT.tolist() == [[0, 0, 0, 0, 6, 6, 8, 8]]


def test_blocks_reach_no_further_than_their_windows() -> None:
    spans = causal_spans(torch.zeros(1, 1000, dtype=torch.int64), 50)
    for block in spans.blocks[0]:
        assert block.end_query - block.first_query <= attention.QUERY_BLOCK
        assert block.first_key == max(0, block.first_query - 49)


def test_documents() -> None:
    assert documents_from_eos(torch.tensor([[1, 9, 2, 1, 2, 2, 7]])).tolist() == [[0, 0, 0, 1, 1, 2, 3]]
    starts = document_starts(torch.tensor([[3, 3, 1, 3, -1, -1]]))
    assert starts.tolist() == [[True, False, True, True, True, False]]


def test_rotations_against_float64() -> None:
    """Angles are float32: at position p they carry p * 2^-24, their cosines and sines one more rounding."""
    config = transformer_config(width=32, heads=2, rope_theta=10000.0)
    positions = torch.tensor([[0, 1, 7, 511, 8191]])
    found = rotations(positions, config)[0, :, 0]
    pair = torch.arange(0, 16, 2, dtype=torch.float64)
    angles = positions[0, :, None].double() * 10000.0 ** (-pair / 16)
    bound = 2e-7 + positions[0, :, None] * 2.0**-22
    assert bool(((found.real - angles.cos()).abs() <= bound).all())
    assert bool(((found.imag - angles.sin()).abs() <= bound).all())


def test_scaled_frequencies_pair_by_pair() -> None:
    scaling = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
    config = transformer_config(width=128, heads=1, rope_theta=500000.0, rope_scaling=scaling)  # Llama 3.1's
    found = frequencies(config, torch.device("cpu")).double()
    plain = 500000.0 ** (-torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    expected = torch.stack([scaled_frequency(frequency, scaling) for frequency in plain])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)  # float32 powers carry 1e-6
    shares = expected / plain
    assert [int((shares == share).sum()) for share in (1.0, 0.125)] == [29, 29]  # the other 6 lie between


def test_rotate_turns_interleaved_pairs() -> None:
    config = transformer_config(width=8, heads=2)
    x = torch.tensor([1.0, 0.0, 0.0, 1.0]).expand(1, 2, 2, 4)
    turned = rotate(x, rotations(torch.tensor([[0, 3]]), config))
    slow, fast = torch.tensor(3 * 10000.0**-0.5), torch.tensor(3.0)
    expected = torch.stack((fast.cos(), fast.sin(), -slow.sin(), slow.cos()))
    torch.testing.assert_close(turned[0, 0], x[0, 0])
    torch.testing.assert_close(turned[0, 1], expected.expand(2, 4))
