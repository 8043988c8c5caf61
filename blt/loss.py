"""Next-byte cross-entropy over a batch, in nats, and hits; the bits-per-byte of the field.

In: logits [B,T,V], targets int64 [B,T] with -1 where there is none. Out: a float32 sum and an int64 count.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from blt.vocabulary import BYTE_OFFSET

NO_TARGET = -1


def summed_cross_entropy(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Sum of -ln p(target) over all targets, float32 or wider, in nats; NO_TARGET places count 0."""
    wide = logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32))
    return F.cross_entropy(wide.flatten(0, 1), targets_BT.flatten(), ignore_index=NO_TARGET, reduction="sum")


def row_cross_entropy(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """The sum of each row, float64 [B] in nats; otherwise as `summed_cross_entropy`."""
    wide = logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32))
    nats_N = F.cross_entropy(wide.flatten(0, 1), targets_BT.flatten(), ignore_index=NO_TARGET, reduction="none")
    return nats_N.view_as(targets_BT).double().sum(1)


def row_hits(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Bytes of each row that were the most likely next id, int64 [B]; EOS, which is no byte, is not counted."""
    return ((logits_BTV.argmax(-1) == targets_BT) & (targets_BT >= BYTE_OFFSET)).sum(1)


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """Summed nats (bytes and EOS predicted) per document byte, in bits: paper eq. 18 with the EOS charged."""
    return nats / (math.log(2) * num_bytes)
