"""Causal self-attention over documents, optionally windowed, in blocks of queries: the spans, and the
banded path, which runs wherever `blt.flex_attention` does not (on CPU, in float64, for very narrow heads).

In: q [B,T,H,K], k and v [B,S,H,K] (S = carried keys + T) and a `CausalSpans`, which gives for every query the
contiguous run of keys it sees. Out: [B,T,H,K]. Only one block of queries against the keys that block can see is
ever in memory, so nothing of size T x T is built (forward or backward); the softmax is in float32 or wider.

Shapes: B rows, T queries, S keys, H heads, K head width, Q queries of a block, L keys of a block.
Source of the mask: the published models (query i sees key j iff same document and i - window < j <= i).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from blt.vocabulary import EOS

QUERY_BLOCK = 128
"""Queries per block: 128 x (window + 128) scores of one head stay in a core's cache at the usual windows."""


@dataclass(frozen=True)
class Block:
    """Queries [first_query, end_query) of one row, which see keys from first_key on, all of them those from all_see."""

    first_query: int
    end_query: int
    first_key: int
    all_see: int


@dataclass(frozen=True)
class CausalSpans:
    """Which keys each query sees: [first_key_BT[i], i + carried].

    first_key_BT: int64 [B,T], never decreasing along a row. positions_BT: int64 [B,T], index within the document.
    """

    first_key_BT: Tensor
    positions_BT: Tensor
    carried: int

    @cached_property
    def blocks(self) -> tuple[tuple[Block, ...], ...]:
        """The blocks of each row; made when they are asked for, since reading the borders waits for a CUDA device."""
        batch, length = self.first_key_BT.shape
        edges = list(range(0, length, QUERY_BLOCK))
        ends = [min(edge + QUERY_BLOCK, length) for edge in edges]
        firsts = self.first_key_BT[:, edges].tolist()
        lasts = self.first_key_BT[:, [end - 1 for end in ends]].tolist()
        return tuple(
            tuple(
                Block(edge, end, firsts[row][i], lasts[row][i])
                for i, (edge, end) in enumerate(zip(edges, ends, strict=True))
            )
            for row in range(batch)
        )


def documents_from_eos(byte_ids_BT: Tensor) -> Tensor:
    """Document numbers int64 [B,T] where an EOS closes a document (inclusive), as the reference."""
    closed = (byte_ids_BT == EOS).long()
    return closed.cumsum(1) - closed


def document_starts(document_ids_BT: Tensor) -> Tensor:
    """Bool [B,T]: True where a row's document differs from the one before it (and at the row's first place)."""
    first = torch.ones_like(document_ids_BT, dtype=torch.bool)
    first[:, 1:] = document_ids_BT[:, 1:] != document_ids_BT[:, :-1]
    return first


def causal_spans(document_ids_BT: Tensor, window: int | None, carried: int = 0) -> CausalSpans:
    """The spans of a batch. `carried` keys of each row's first document precede its first query."""
    place = torch.arange(document_ids_BT.shape[1], device=document_ids_BT.device)
    start_BT = torch.where(document_starts(document_ids_BT), place, 0).cummax(1).values
    first_key_BT = torch.where(start_BT == 0, 0, start_BT + carried)
    if window is not None:
        first_key_BT = torch.maximum(first_key_BT, place + (carried - window + 1))
    return CausalSpans(first_key_BT, place - start_BT, carried)


def causal_attention(q_BTHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor, spans: CausalSpans) -> Tensor:
    """Softmax attention of every query over its span of keys, scaled by head width ** -0.5: [B,T,H,K]."""
    q = (q_BTHK * q_BTHK.shape[-1] ** -0.5).transpose(1, 2).contiguous()
    k, v = k_BSHK.transpose(1, 2).contiguous(), v_BSHK.transpose(1, 2).contiguous()
    out: Tensor = _BlockedAttention.apply(q, k, v, spans)  # type: ignore[no-untyped-call]
    return out.transpose(1, 2)


def place_attention(q_RHGK: Tensor, k_RHCK: Tensor, v_RHCK: Tensor, mask_R11C: Tensor | None) -> Tensor:
    """Softmax attention of one position's G queries per head over C keys, scaled as above: [R,H,G,K].

    The mask is added to the scores: -inf for a key that a row does not see.
    """
    scores = torch.matmul(q_RHGK * q_RHGK.shape[-1] ** -0.5, k_RHCK.transpose(2, 3))
    if mask_R11C is not None:
        scores = scores + mask_R11C
    p = torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32))
    return torch.matmul(p.to(v_RHCK.dtype), v_RHCK)


def _probabilities(q_HQK: Tensor, k_HLK: Tensor, block: Block, first_key_T: Tensor) -> Tensor:
    """Softmax over a block's keys, [H,Q,L], in float32 or wider; keys outside a query's span get 0.

    The mask is made once for all heads and added by the product itself: masking [H,Q,L] scores costs twice the softmax.
    """
    (_, queries, _), keys = q_HQK.shape, k_HLK.shape[1]
    mask_QL = q_HQK.new_zeros(queries, keys)
    if block.all_see > block.first_key:
        key = torch.arange(block.first_key, block.all_see, device=mask_QL.device)
        hidden = key < first_key_T[block.first_query : block.end_query, None]
        mask_QL[:, : block.all_see - block.first_key].masked_fill_(hidden, -torch.inf)
    future = torch.ones(queries, queries - 1, dtype=torch.bool, device=mask_QL.device).triu_()
    mask_QL[:, keys - queries + 1 :].masked_fill_(future, -torch.inf)
    scores = torch.baddbmm(mask_QL.expand(q_HQK.shape[0], -1, -1), q_HQK, k_HLK.transpose(1, 2))
    return torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32))


class _BlockedAttention(torch.autograd.Function):
    """Attention block by block; the backward pass computes each block's probabilities again."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, spans: CausalSpans) -> Tensor:
        out = torch.empty_like(q)
        for row, blocks in enumerate(spans.blocks):
            for block in blocks:
                queries = slice(block.first_query, block.end_query)
                keys = slice(block.first_key, block.end_query + spans.carried)
                p = _probabilities(q[row, :, queries], k[row, :, keys], block, spans.first_key_BT[row])
                out[row, :, queries] = torch.bmm(p.to(v.dtype), v[row, :, keys])
        ctx.save_for_backward(q, k, v, out)
        ctx.spans = spans
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (grad_out,) = grads
        q, k, v, out = ctx.saved_tensors
        spans: CausalSpans = ctx.spans
        grad_out = grad_out.contiguous()
        wide = torch.promote_types(q.dtype, torch.float32)
        grad_q = torch.empty_like(q)
        grad_k, grad_v = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        delta = (grad_out * out).sum(-1, keepdim=True, dtype=wide)
        for row, blocks in enumerate(spans.blocks):
            for block in blocks:
                queries = slice(block.first_query, block.end_query)
                keys = slice(block.first_key, block.end_query + spans.carried)
                q_b, k_b, v_b, g_b = q[row, :, queries], k[row, :, keys], v[row, :, keys], grad_out[row, :, queries]
                p = _probabilities(q_b, k_b, block, spans.first_key_BT[row])
                grad_v[row, :, keys] += torch.bmm(p.to(v.dtype).transpose(1, 2), g_b)
                grad_p = torch.bmm(g_b, v_b.transpose(1, 2)).to(wide)
                grad_s = grad_p.sub_(delta[row, :, queries]).mul_(p).to(q.dtype)
                grad_q[row, :, queries] = torch.bmm(grad_s, k_b)
                grad_k[row, :, keys] += torch.bmm(grad_s.transpose(1, 2), q_b)
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None
