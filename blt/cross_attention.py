"""Cross-attention between bytes and patches: a softmax over each patch's bytes (encoder) or slots (decoder).

In: bytes [B,T,D], patch slots [B,P,k,D], the flat patch of each byte [B*T]. Out: the attention's output without any
residual, [B,P,k,D] or [B,T,D]. A byte meets the k slots of one patch only, so the cost is O(T * k), never T x P.
Shapes: B rows, T bytes, P patches, k slots of a patch, D width, H heads, K head width, N = B * T.
Source: arXiv 2412.09871 section 3 (no rotary positions, separate RMSNorm on queries and on keys and values).
"""

import math

import torch
from torch import Tensor, nn

from blt.layers import RMSNorm
from blt.segments import gather_rows, softmax_rows, sum_rows


class CrossAttention(nn.Module):
    """Bias-free multi-head attention of queries over a second sequence of the same width; keys and values merged."""

    def __init__(self, width: int, heads: int, norm_eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm_q = RMSNorm(width, norm_eps)
        self.norm_kv = RMSNorm(width, norm_eps)
        self.wq = nn.Linear(width, width, bias=False)
        self.wkv = nn.Linear(width, 2 * width, bias=False)
        self.wo = nn.Linear(width, width, bias=False)

    def patches_read_bytes(self, slots_BPkD: Tensor, bytes_BTD: Tensor, patch_N: Tensor) -> Tensor:
        """Each slot attends to the bytes of its patch: [B,P,k,D]; a patch without bytes gets 0."""
        queries = self._queries(slots_BPkD)
        keys, values = (self._heads(part) for part in self._pairs(bytes_BTD).chunk(2, -1))
        scores = self._scores(gather_rows(queries, patch_N), keys[:, None])
        weights = softmax_rows(scores, patch_N, queries.shape[0]).to(values.dtype)
        mixed = sum_rows(weights[..., None] * values[:, None], patch_N, queries.shape[0])
        out: Tensor = self.wo(mixed.flatten(-2))
        return out.view(slots_BPkD.shape)

    def slot_pairs(self, slots_BPkD: Tensor) -> Tensor:
        """Keys beside values of the slots of every patch, [B*P,k,2D]."""
        return self._pairs(slots_BPkD)

    def bytes_read_patches(self, bytes_BTD: Tensor, pairs_NkE: Tensor) -> Tensor:
        """Each byte attends to the k slots of one patch, whose `slot_pairs` are given for each byte: [B,T,D]."""
        queries = self._queries(bytes_BTD)
        keys, values = (self._heads(part) for part in pairs_NkE.chunk(2, -1))
        weights = torch.softmax(self._scores(queries[:, None], keys), 1).to(values.dtype)
        mixed = (weights[..., None] * values).sum(1)
        out: Tensor = self.wo(mixed.flatten(-2))
        return out.view(bytes_BTD.shape)

    def _queries(self, x: Tensor) -> Tensor:
        return self._heads(self.wq(self.norm_q(x))).flatten(0, 1)

    def _pairs(self, x: Tensor) -> Tensor:
        """Keys beside values, the first two dimensions as one."""
        pairs: Tensor = self.wkv(self.norm_kv(x)).flatten(0, 1)
        return pairs

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self.heads, -1)

    @staticmethod
    def _scores(queries: Tensor, keys: Tensor) -> Tensor:
        """Scaled products [N,k,H], float32 or wider."""
        wide = torch.promote_types(queries.dtype, torch.float32)
        return (queries * keys).sum(-1, dtype=wide) / math.sqrt(queries.shape[-1])
