"""Causal self-attention by torch's FlexAttention: compiled on CUDA; in eager mode on CPU, where only tests use it.

In: q [B,T,H,K], k and v [B,S,G,K] (S = carried keys + T, H a multiple of G), rotations of queries and keys, and the
block mask of a `CausalSpans`. Out: [B,T,H,K]; the softmax is in float32 or wider. Rotation is compiled with attention:
by itself it moves five times as many bytes through a GPU's memory. The eager form builds all scores, so what cannot be
compiled takes the banded path of `blt.attention`.

On CPU the mask, and the operator in eager mode, equal the banded path and dense attention, forward and gradients;
`pytest -m gpu` holds the compiled kernels to the same.

Shapes: B rows, T queries, S keys, H query heads, G key heads, K head width, N blocks of queries, M blocks of keys.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from blt.attention import CausalSpans

logger = logging.getLogger(__name__)

BLOCK: Final = 128
"""Queries and keys of a block of the mask; the kernels' own tiles divide it."""

LEAST_HEAD_WIDTH: Final = 16
"""The CUDA kernels multiply tiles at least this wide. Widths that are no power of two run padded to the next one."""

DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)
"""What the CUDA kernels take; they sum in float32, so float64 would lose half of its digits."""

RECOMPILE_LIMIT: Final = 64
"""Variants in a process. The shapes of heads, dtypes, gradients or none, and sizes of 1 each make one; torch's default
of 8 is too few for a BLT that is trained and evaluated beside its entropy model."""

Turns = tuple[Tensor, Tensor]
"""`real_turns` of queries and of keys."""

Kind = tuple[torch.dtype, int, int, int, bool]
"""What a kernel is compiled for: dtype, H, G, K, and whether for gradients too."""

_refused: set[Kind] = set()
"""What could not be compiled in this process."""


class NotCompiledError(RuntimeError):
    """torch.compile ran a function as it stands."""


def flex_fits(q_BTHK: Tensor) -> bool:
    """Whether attention of these queries runs through FlexAttention."""
    wide_enough = q_BTHK.shape[-1] >= LEAST_HEAD_WIDTH
    return q_BTHK.is_cuda and q_BTHK.dtype in DTYPES and wide_enough and q_BTHK.numel() > 0


def flex_causal_attention(
    q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, turns: Turns, mask: BlockMask
) -> Tensor | None:
    """Softmax attention of every rotated query over its span of rotated keys, scaled by head width ** -0.5: [B,T,H,K].

    None on CUDA where it could not be compiled.
    """
    attention = compiled_attention if q_BTHK.is_cuda else rotated_attention
    return attention(q_BTHK, k_BSGK, v_BSGK, turns, mask)


def block_mask(spans: CausalSpans) -> BlockMask:
    """The mask of a batch, for all heads and layers: the key blocks that a block of queries sees in part, and in whole.

    A block of queries sees one run of keys, since spans never move back and follow each other without a gap; the keys
    that all of its queries see are a run inside it. So both ends of the full blocks and of the partial ones around them
    come from the spans of the block's first and last query, and no query is compared with a key here. Index tensors
    are int32 [B,1,N,M] with M all blocks of keys, not the few of a window, since torch 2.13's `from_kv_blocks` takes
    the width for their number when it transposes them for the backward pass: 16 kB a row at T = 8192, 256 kB at 32768.
    """
    (_, length), carried, device = spans.first_key_BT.shape, spans.carried, spans.first_key_BT.device
    first_N = torch.arange(0, length, BLOCK, device=device)
    last_N = (first_N + BLOCK - 1).clamp(max=length - 1)
    begin_BN = spans.first_key_BT[:, first_N] // BLOCK
    end_BN = ((last_N + carried) // BLOCK + 1).expand_as(begin_BN)
    full_begin_BN = (spans.first_key_BT[:, last_N] + BLOCK - 1) // BLOCK
    # A last block of fewer queries has no full blocks, as in torch's own masks.
    full_end_N = torch.where(last_N - first_N == BLOCK - 1, (first_N + carried + 1) // BLOCK, 0)
    full_end_BN = torch.maximum(full_end_N, full_begin_BN)

    place_M = torch.arange(-(-(length + carried) // BLOCK), device=device)
    before_BN = full_begin_BN - begin_BN
    partial_BNM = place_M + torch.where(
        place_M < before_BN[..., None], begin_BN[..., None], (full_end_BN - before_BN)[..., None]
    )
    return BlockMask.from_kv_blocks(
        _per_head(before_BN + end_BN - full_end_BN),
        _per_head(partial_BNM.clamp(max=len(place_M) - 1)),  # places beyond the count are not read, but stay in range
        _per_head(full_end_BN - full_begin_BN),
        _per_head((place_M + full_begin_BN[..., None]).clamp(max=len(place_M) - 1)),
        BLOCK_SIZE=BLOCK,
        mask_mod=visibility(spans),
        seq_lengths=(length, length + carried),
    )


def visibility(spans: CausalSpans) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Which query sees which key, as FlexAttention asks: of a row, a head, a query and a key."""
    first_key_BT = spans.first_key_BT.int()
    # A tensor, since a number would be compiled into the kernel; filled on the device, since a copy would wait for it.
    carried = torch.full((), spans.carried, dtype=torch.int32, device=first_key_BT.device)

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (first_key_BT[row, query] <= key) & (key <= query + carried)

    return sees


def rotated_attention(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, turns: Turns, mask: BlockMask) -> Tensor:
    """Rotation and attention as they stand."""
    query_turns, key_turns = turns
    return eager_attention(_rotated(q_BTHK, query_turns), _rotated(k_BSGK, key_turns), v_BSGK, mask)


def real_turns(rotations_BT1C: Tensor) -> Tensor:
    """Complex rotations of pairs as what each number, and its partner, is multiplied with: [2,B,T,1,K].

    The compiler makes one kernel of a rotation in real numbers; it has none of complex ones.
    """
    cos, sin = rotations_BT1C.real, rotations_BT1C.imag
    return torch.stack((torch.stack((cos, cos), -1), torch.stack((-sin, sin), -1))).flatten(-2)


def _rotated(x_BTHK: Tensor, turns: Tensor) -> Tensor:
    """`blt.layers.rotate` in real numbers."""
    wide = x_BTHK.to(torch.promote_types(x_BTHK.dtype, torch.float32))
    partners = wide.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    turned: Tensor = wide * turns[0] + partners * turns[1]
    return turned.to(x_BTHK.dtype)


def eager_attention(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, mask: BlockMask) -> Tensor:
    """Attention by the operator as it stands, which compiles where torch.compile reads it."""
    out = flex_attention(
        q_BTHK.transpose(1, 2),
        k_BSGK.transpose(1, 2),
        v_BSGK.transpose(1, 2),
        block_mask=mask,
        enable_gqa=q_BTHK.shape[2] != k_BSGK.shape[2],
        kernel_options={"BACKEND": "TRITON"},  # one kernel for all lengths: AUTO has another below 128 queries
    )
    return out.transpose(1, 2)


def compiled_attention(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, turns: Turns, mask: BlockMask) -> Tensor | None:
    """Rotation and attention by compiled kernels. None, with a warning once for each kind of input, without them."""
    # Only where it is needed: importing the compiler takes half a second.
    from torch._dynamo.exc import FailOnRecompileLimitHit, ShortenTraceback, Unsupported

    gradients = torch.is_grad_enabled() and (q_BTHK.requires_grad or k_BSGK.requires_grad or v_BSGK.requires_grad)
    kind = (q_BTHK.dtype, q_BTHK.shape[2], k_BSGK.shape[2], q_BTHK.shape[3], gradients)
    if kind in _refused:
        return None
    try:
        return _compiled()(q_BTHK, k_BSGK, v_BSGK, *turns, mask)
    except (ShortenTraceback, Unsupported, FailOnRecompileLimitHit, NotCompiledError) as error:  # what compiling raises
        logger.warning("FlexAttention cannot be compiled for %s, going on in bands", kind, exc_info=error)
        _refused.add(kind)
        return None


@functools.cache
def _compiled() -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, BlockMask], Tensor]:
    """Sizes are left open, so that rows of other lengths need no other kernel."""
    compiled: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, BlockMask], Tensor] = torch.compile(
        _traced_attention,
        backend=_both_passes,
        dynamic=True,
        fullgraph=True,
        recompile_limit=RECOMPILE_LIMIT,  # type: ignore[call-overload]  # its overloads lack it
    )
    return compiled


def _both_passes(graph: torch.fx.GraphModule, examples: list[Tensor]) -> Callable[..., Any]:
    """torch's compiler; it compiles the backward pass at once, so that what that lacks shows before the forward pass
    has run, while there is another path to take."""
    from torch._dynamo import lookup_backend
    from torch._functorch import config

    with config.patch(force_non_lazy_backward_lowering=True):
        return lookup_backend("inductor")(graph, examples)


def _traced_attention(
    q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, query_turns: Tensor, key_turns: Tensor, mask: BlockMask
) -> Tensor:
    if not torch.compiler.is_dynamo_compiling():
        raise NotCompiledError("torch.compile is switched off here")  # by an environment variable, a mode, a stance
    return eager_attention(_rotated(q_BTHK, query_turns), _rotated(k_BSGK, key_turns), v_BSGK, mask)


def _per_head(values: Tensor) -> Tensor:
    """int32 [B,1,...]: the same for all heads; contiguous, which the kernels count on."""
    return values[:, None].int().contiguous()
