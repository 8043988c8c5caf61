"""Cross-entropy summed over targets, and bits per byte."""

import math

import torch

from blt.loss import NO_TARGET, bits_per_byte, row_hits, summed_cross_entropy
from blt.vocabulary import BYTE_OFFSET, EOS


def test_sum_over_targets_alone() -> None:
    logits = torch.randn(2, 3, 260, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[5, NO_TARGET, 0], [NO_TARGET, 259, NO_TARGET]])
    log_p = torch.log_softmax(logits.double(), -1)
    expected = -(log_p[0, 0, 5] + log_p[0, 2, 0] + log_p[1, 1, 259])
    found = summed_cross_entropy(logits, targets)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


def test_no_target_is_zero_with_zero_gradient() -> None:
    logits = torch.randn(1, 4, 260, requires_grad=True)
    loss = summed_cross_entropy(logits, torch.full((1, 4), NO_TARGET))
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None
    assert not bool(logits.grad.any())


def test_bfloat16_is_summed_in_float32() -> None:
    """4096 terms of ln 260: bfloat16 would stop counting at 256 times the term."""
    logits = torch.zeros(1, 4096, 260, dtype=torch.bfloat16)
    loss = summed_cross_entropy(logits, torch.zeros(1, 4096, dtype=torch.int64))
    assert loss.dtype == torch.float32
    assert math.isclose(float(loss), 4096 * math.log(260), rel_tol=1e-5)


def test_bits_per_byte() -> None:
    assert math.isclose(bits_per_byte(100 * math.log(2), 50), 2.0)


def test_hits_are_bytes_that_were_the_most_likely() -> None:
    likely = [[BYTE_OFFSET + 7, EOS, BYTE_OFFSET, 259], [BYTE_OFFSET, BYTE_OFFSET, EOS, BYTE_OFFSET]]
    logits = torch.nn.functional.one_hot(torch.tensor(likely), 260).float()
    targets = torch.tensor([[BYTE_OFFSET + 7, EOS, 259, 259], [NO_TARGET, BYTE_OFFSET + 1, BYTE_OFFSET, BYTE_OFFSET]])
    assert row_hits(logits, targets).tolist() == [2, 1]  # EOS at its place counts no more than a place without target
