"""Causal self-attention over documents, optionally windowed, in blocks of queries: the spans, and the
banded path, which runs wherever `blt.flex_attention` does not (on CPU, in float64, for very narrow heads).

In: q [B,T,H,K], k and v [B,S,H,K] (S = carried keys + T) and a `CausalSpans`, which gives for every query the
contiguous run of keys it sees. Out: [B,T,H,K]. Only one block of queries against the keys that block can see is
ever in memory, so nothing of size T x T is built (forward or backward); the softmax is in float32 or wider.

Shapes: B rows, T queries, S keys, H heads, K head width, Q queries of a block, L keys of a block.
Source of the mask: the published models (query i sees key j iff same document and i - window < j <= i).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from blt.vocabulary import EOS

QUERY_BLOCK = 128
"""Queries per block: 128 x (window + 128) scores of one head stay in a core's cache at the usual windows."""

SCORES_AT_ONCE = 1 << 20
"""Heads of a block are taken together up to about so many scores, of 4 MB: what stays in a processor's cache."""


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


def place_attention(q_NGK: Tensor, k_NCK: Tensor, v_NCK: Tensor, mask_N1C: Tensor | None) -> Tensor:
    """Softmax attention of one position's G queries, already scaled, of each of N key heads over C keys: [N,G,K].

    The mask is added to the scores: -inf for a key that is not seen.
    """
    k_NKC = k_NCK.transpose(1, 2)
    scores = torch.bmm(q_NGK, k_NKC) if mask_N1C is None else torch.baddbmm(mask_N1C, q_NGK, k_NKC)
    p = torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32))
    return torch.bmm(p.to(v_NCK.dtype), v_NCK)


class _BlockedAttention(torch.autograd.Function):
    """Attention block by block; the backward pass computes each block's probabilities again."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, spans: CausalSpans) -> Tensor:
        out, scratch = torch.empty_like(q), _Scratch(q)
        for part in _parts(q, spans):
            p = scratch.probabilities(q, k, part)
            out[part.queries] = torch.bmm(p.to(v.dtype), v[part.keys])
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
        scratch, second = _Scratch(q), _Scratch(q)
        for part in _parts(q, spans):
            p = scratch.probabilities(q, k, part)
            q_b, k_b, g_b = q[part.queries], k[part.keys], grad_out[part.queries]
            _add_product(grad_v[part.keys], p.to(v.dtype).transpose(1, 2), g_b)
            grad_p = second.product(g_b, v[part.keys]).to(wide)
            grad_s = grad_p.sub_(delta[part.queries]).mul_(p).to(q.dtype)
            grad_q[part.queries] = torch.bmm(grad_s, k_b)
            _add_product(grad_k[part.keys], grad_s.transpose(1, 2), q_b)
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None


_Index = tuple[int, slice, slice]
"""Row, heads and positions in a tensor [B,H,T,K]."""


@dataclass(frozen=True)
class _Part:
    """What is computed at once: a block of queries in some heads."""

    queries: _Index
    keys: _Index
    first_mask: Tensor
    """Added to the scores of the block's first keys, which not all of its queries see."""
    last_mask: Tensor
    """Added to those of the last keys, which lie behind some of its queries."""


def _parts(q_BHTK: Tensor, spans: CausalSpans) -> Iterator[_Part]:
    heads = q_BHTK.shape[1]
    for row, blocks in enumerate(spans.blocks):
        for block in blocks:
            queries = slice(block.first_query, block.end_query)
            keys = slice(block.first_key, block.end_query + spans.carried)
            num_queries, num_keys = queries.stop - queries.start, keys.stop - keys.start
            key = torch.arange(block.first_key, max(block.first_key, block.all_see), device=q_BHTK.device)
            unseen = key < spans.first_key_BT[row, queries, None]
            future = torch.ones(num_queries, num_queries - 1, dtype=torch.bool, device=q_BHTK.device).triu_()
            masks = _minus_infinity(unseen, q_BHTK.dtype), _minus_infinity(future, q_BHTK.dtype)
            at_once = min(heads, max(1, SCORES_AT_ONCE // (num_queries * num_keys)))
            for head in range(0, heads, at_once):
                some = slice(head, min(head + at_once, heads))
                yield _Part((row, some, queries), (row, some, keys), *masks)


class _Scratch:
    """Room for the scores of a part, which all parts of a pass use: fresh pages cost as much as a product."""

    def __init__(self, like: Tensor) -> None:
        self._room = like.new_empty(0)

    def product(self, q_HQK: Tensor, k_HLK: Tensor) -> Tensor:
        """q @ k transposed, [H,Q,L], until the next product."""
        shape = (q_HQK.shape[0], q_HQK.shape[1], k_HLK.shape[1])
        if self._room.numel() < math.prod(shape):
            self._room = q_HQK.new_empty(math.prod(shape))
        scores = self._room[: math.prod(shape)].view(shape)
        return torch.bmm(q_HQK, k_HLK.transpose(1, 2), out=scores)

    def probabilities(self, q_BHTK: Tensor, k_BHSK: Tensor, part: _Part) -> Tensor:
        """Softmax over a part's keys, [H,Q,L], in float32 or wider; keys outside a query's span get 0.

        Only where some queries see a key and others do not is anything masked: at both ends.
        """
        scores = self.product(q_BHTK[part.queries], k_BHSK[part.keys])
        scores[:, :, : part.first_mask.shape[1]] += part.first_mask
        scores[:, :, scores.shape[2] - part.last_mask.shape[1] :] += part.last_mask
        wide = torch.promote_types(scores.dtype, torch.float32)
        return torch.softmax(scores, -1, out=scores) if wide == scores.dtype else torch.softmax(scores, -1, dtype=wide)


def _minus_infinity(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """0 or -inf where hidden: an addition takes a fraction of what masking [H,Q,L] takes."""
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)


def _add_product(into: Tensor, a: Tensor, b: Tensor) -> None:
    if into.dtype == a.dtype:
        into.baddbmm_(a, b)
    else:
        into += torch.bmm(a, b)
