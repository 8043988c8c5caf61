"""FlexAttention in eager mode on CPU against the banded path and dense attention, its block mask against torch's own,
whole models through either path.

The eager operator reads the mask's function and not its blocks; the kernels read both. So the blocks are held to the
function by themselves, from the side of the queries (forward) and of the keys (backward).
"""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from blt import flex_attention
from blt.attention import CausalSpans, causal_attention, causal_spans
from blt.entropy_model import EntropyModel, EntropyModelConfig, document_entropies
from blt.flex_attention import Turns, block_mask, eager_attention, flex_fits, real_turns, rotated_attention, visibility
from blt.layers import TransformerConfig, rotate, rotations
from blt.loss import summed_cross_entropy
from blt.model import BLT
from blt.recomputation import Recomputation, recompute_blocks
from tests.blt.test_attention import dense, visible
from tests.blt.test_memory import largest_of
from tests.blt.test_sharding import Trace, loss_in_bfloat16, sharded_steps, whole_steps
from tests.flex_forced import flex_forced, gradients_on_cpu
from tests.gloo import run_ranks
from tests.model_cases import blt_config, packed_batch, randomised, transformer_config

HEADS, HEAD_WIDTH = 4, 16
# Values around 1 are sums of up to 737 terms, each rounded to 2 ** -24 or 2 ** -53 of it by either path. In the cases
# below the two differ by 4e-7 (float32) and 1.4e-15 (float64), in gradients by 2.2e-6 and 7e-15: ten times that.
FORWARD = {torch.float32: 4e-6, torch.float64: 1.4e-14}
GRADIENT = {torch.float32: 2.2e-5, torch.float64: 7e-14}


def documents_of(length: int) -> Tensor:
    """Document ids [3,T]: documents that begin inside blocks and padding at the end; one document; one each byte."""
    several = torch.zeros(length, dtype=torch.int64)
    for number, border in enumerate((length // 5, length // 2, 2 * length // 3 + 1)):
        several[border:] = number + 1
    several[length - length // 6 :] = -1
    return torch.stack((several, torch.zeros_like(several), torch.arange(length)))


def inputs(rows: int, length: int, carried: int, kv_heads: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    sizes = ((rows, length, HEADS), (rows, length + carried, kv_heads), (rows, length + carried, kv_heads))
    q, k, v = (torch.randn(*size, HEAD_WIDTH, generator=generator, dtype=torch.float64).to(dtype) for size in sizes)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def banded(q: Tensor, k: Tensor, v: Tensor, spans: CausalSpans) -> Tensor:
    repeats = q.shape[2] // k.shape[2]
    return causal_attention(q, k.repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2), spans)


def rotations_of(length: int, carried: int, head_width: int = HEAD_WIDTH) -> Tensor:
    """Of the keys of one run of positions, which all rows share; the last `length` are those of the queries."""
    return rotations(torch.arange(carried + length)[None], TransformerConfig(width=head_width, layers=1, heads=1))


def turns_of(length: int, carried: int, head_width: int = HEAD_WIDTH) -> Turns:
    keys = rotations_of(length, carried, head_width)
    return real_turns(keys[:, carried:]), real_turns(keys)


def rotated_bands(q: Tensor, k: Tensor, v: Tensor, spans: CausalSpans) -> Tensor:
    keys = rotations_of(q.shape[1], spans.carried, q.shape[-1])
    return banded(rotate(q, keys[:, spans.carried :]), rotate(k, keys), v, spans)


def assert_same(
    attention: Callable[[Tensor, Tensor, Tensor], Tensor],
    expected: Callable[[Tensor, Tensor, Tensor], Tensor],
    qkv: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Values and gradients of q, k and v."""
    dtype = qkv[0].dtype
    found, wanted = attention(*qkv), expected(*qkv)
    torch.testing.assert_close(found, wanted, rtol=0, atol=FORWARD[dtype])
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    for ours, theirs in zip(
        torch.autograd.grad(found, qkv, weight), torch.autograd.grad(wanted, qkv, weight), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=GRADIENT[dtype])


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.float64])
@pytest.mark.parametrize(("carried", "kv_heads"), [(0, HEADS), (0, 1), (37, 2)])
@pytest.mark.parametrize("length", [1, 127, 128, 129, 700])
@pytest.mark.parametrize("window", [None, 1, 7, 128, 512])
def test_equals_the_banded_path(
    window: int | None, length: int, carried: int, kv_heads: int, dtype: torch.dtype
) -> None:
    document_ids = documents_of(length)[: 3 if length < 200 else 1]  # the eager operator is slow on long rows
    spans = causal_spans(document_ids, window, carried)
    mask = block_mask(spans)
    with gradients_on_cpu():
        assert_same(
            lambda q, k, v: eager_attention(q, k, v, mask),
            lambda q, k, v: banded(q, k, v, spans),
            inputs(len(document_ids), length, carried, kv_heads, dtype),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("window", "carried", "kv_heads"), [(None, 0, HEADS), (7, 6, 2), (128, 200, 1)])
def test_equals_dense_attention(window: int | None, carried: int, kv_heads: int, dtype: torch.dtype) -> None:
    """Under a mask written out place by place."""
    document_ids = documents_of(150)
    mask = block_mask(causal_spans(document_ids, window, carried))
    seen = visible(document_ids, window, carried)
    repeats = HEADS // kv_heads
    with gradients_on_cpu():
        assert_same(
            lambda q, k, v: eager_attention(q, k, v, mask),
            lambda q, k, v: dense(q, k.repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2), seen),
            inputs(len(document_ids), 150, carried, kv_heads, dtype),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("carried", [0, 37])
def test_rotation_in_real_numbers_equals_that_in_complex_ones(carried: int, dtype: torch.dtype) -> None:
    spans, turns = causal_spans(documents_of(150), 50, carried), turns_of(150, carried)
    mask = block_mask(spans)
    with gradients_on_cpu():
        assert_same(
            lambda q, k, v: rotated_attention(q, k, v, turns, mask),
            lambda q, k, v: rotated_bands(q, k, v, spans),
            inputs(3, 150, carried, 2, dtype),
        )


@st.composite
def spans_cases(draw: st.DrawFn) -> tuple[Tensor, int | None, int]:
    """Document ids of one or two rows, dense borders or few; a window; carried keys."""
    length, rows = draw(st.integers(1, 300)), draw(st.integers(1, 2))
    rate = draw(st.sampled_from([0.0, 0.01, 0.3]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    document_ids = (torch.rand(rows, length, generator=generator) < rate).long().cumsum(1)
    window = draw(st.sampled_from([None, 1, 2, 60, 128, 130, 299]))
    return document_ids, window, draw(st.sampled_from([0, 1, 100, 128, 200]))


@settings(max_examples=15)
@given(spans_cases())
def test_random_documents(case: tuple[Tensor, int | None, int]) -> None:
    document_ids, window, carried = case
    spans = causal_spans(document_ids, window, carried)
    mask = block_mask(spans)
    with gradients_on_cpu():
        assert_same(
            lambda q, k, v: eager_attention(q, k, v, mask),
            lambda q, k, v: banded(q, k, v, spans),
            inputs(*document_ids.shape, carried, 2, torch.float64),
        )


def seen_through_blocks(counts: Tensor, indices: Tensor, mask: BlockMask) -> Tensor:
    """Bool [B,N,M] of pairs of blocks listed by one side of a mask, [B,1,N] and [B,1,N,M]."""
    listed = torch.zeros(indices.shape[0], indices.shape[2], indices.shape[3], dtype=torch.bool)
    for row, block in torch.cartesian_prod(torch.arange(indices.shape[0]), torch.arange(indices.shape[2])).tolist():
        here = indices[row, 0, block, : int(counts[row, 0, block])].long()
        assert len(here.unique()) == len(here)  # a block that is listed twice counts twice
        listed[row, block, here] = True
    return listed


@settings(max_examples=60)
@given(spans_cases())
def test_blocks_hold_what_the_queries_see(case: tuple[Tensor, int | None, int]) -> None:
    """Full blocks whole, partial ones under the mask's function, the rest not at all: the visible keys, no others."""
    document_ids, window, carried = case
    mask = block_mask(causal_spans(document_ids, window, carried))
    seen = visible(document_ids, window, carried)
    assert mask.full_kv_num_blocks is not None
    assert mask.full_kv_indices is not None
    partial = seen_through_blocks(mask.kv_num_blocks, mask.kv_indices, mask)
    full = seen_through_blocks(mask.full_kv_num_blocks, mask.full_kv_indices, mask)
    assert not (partial & full).any()
    by_queries = places_of(partial, mask, seen) & under_function(mask, seen) | places_of(full, mask, seen)
    assert torch.equal(by_queries, seen)
    for ours, counts, indices in (
        (partial, mask.q_num_blocks, mask.q_indices),
        (full, mask.full_q_num_blocks, mask.full_q_indices),
    ):
        assert counts is not None
        assert indices is not None
        assert torch.equal(seen_through_blocks(counts, indices, mask), ours.transpose(1, 2))


def places_of(blocks_BNM: Tensor, mask: BlockMask, like_BTS: Tensor) -> Tensor:
    """Bool [B,T,S] of the places in blocks."""
    wide = blocks_BNM.repeat_interleave(flex_attention.BLOCK, 1).repeat_interleave(flex_attention.BLOCK, 2)
    return wide[:, : like_BTS.shape[1], : like_BTS.shape[2]]


def under_function(mask: BlockMask, like_BTS: Tensor) -> Tensor:
    rows, queries, keys = (torch.arange(size) for size in like_BTS.shape)
    zero = torch.zeros((), dtype=torch.int64)
    return mask.mask_mod(rows[:, None, None], zero, queries[:, None], keys)


@settings(max_examples=40)
@given(spans_cases())
def test_the_mask_is_torch_s_own(case: tuple[Tensor, int | None, int]) -> None:
    """Block by block what torch finds by trying every query with every key, in the layout that the kernels read."""
    document_ids, window, carried = case
    spans = causal_spans(document_ids, window, carried)
    ours, (rows, length) = block_mask(spans), document_ids.shape
    theirs = create_block_mask(visibility(spans), rows, 1, length, length + carried, device="cpu")
    assert ours.shape == theirs.shape
    assert ours.BLOCK_SIZE == theirs.BLOCK_SIZE
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        indices = name.replace("num_blocks", "indices")
        found, expected = getattr(ours, indices), getattr(theirs, indices)
        assert (found.shape, found.stride(), found.dtype) == (expected.shape, expected.stride(), expected.dtype)
        used = torch.arange(found.shape[-1]) < getattr(ours, name)[..., None]
        assert torch.equal(found[used], expected[used]), indices
        assert 0 <= int(found.min()) <= int(found.max()) < found.shape[-1]


@pytest.mark.parametrize("window", [None, 512])
def test_a_mask_of_a_long_row_is_small(window: int | None) -> None:
    """No tensor has more elements than the row has places; torch's own way to make it has T x S."""
    length = 8192
    document_ids = torch.arange(length)[None] // 3000
    spans = causal_spans(document_ids, window, 511)
    largest = largest_of(lambda: block_mask(spans))
    assert largest.num_elements <= length, largest.operation
    short = causal_spans(document_ids[:, :256], window)
    dense_mask = largest_of(lambda: create_block_mask(visibility(short), 1, 1, 256, 256, device="cpu"))
    assert dense_mask.num_elements >= 256 * 256


def test_bfloat16_is_near_float32() -> None:
    """Scores and softmax in float32 from bfloat16 queries and keys: within the 8 bits of what goes in and out."""
    spans = causal_spans(documents_of(200), 50)
    mask, wide = block_mask(spans), inputs(3, 200, 0, 2, torch.float32)
    narrow = tuple(x.detach().bfloat16().requires_grad_() for x in wide)
    with gradients_on_cpu():
        found = eager_attention(*narrow, mask)
        expected = banded(*(x.detach().float().requires_grad_() for x in narrow), spans)
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), expected, rtol=2**-7, atol=2**-7)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(eager_attention(*narrow, mask), found)
            assert eager_attention(*wide, mask).dtype == torch.bfloat16
        grads = torch.autograd.grad(found.float().square().sum(), narrow)
    expected_grads = torch.autograd.grad(banded(*wide, spans).square().sum(), wide)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        assert float((ours.float() - theirs).norm() / theirs.norm()) < 0.02


@pytest.mark.parametrize(
    ("shape", "dtype", "device", "fits"),
    [
        ((2, 9, 4, 64), torch.float32, "cuda", True),
        ((2, 9, 4, 16), torch.bfloat16, "cuda", True),
        ((2, 9, 4, 80), torch.float16, "cuda", True),
        ((2, 9, 4, 64), torch.float64, "cuda", False),
        ((2, 9, 4, 8), torch.float32, "cuda", False),
        ((2, 0, 4, 64), torch.float32, "cuda", False),
        ((2, 9, 4, 64), torch.float32, "cpu", False),
    ],
)
def test_what_fits(shape: tuple[int, ...], dtype: torch.dtype, device: str, fits: bool) -> None:
    """Tensors without memory, so that they can be of a device that is not there."""
    with FakeTensorMode():
        assert flex_fits(torch.empty(shape, dtype=dtype, device=device)) == fits


BATCH = packed_batch([[300, 1, 45, 130], [250, 129]], padding=9)
"""Rows of four blocks, documents that begin inside them, padding."""


def small_blt() -> BLT:
    grouped = {"window": 150, "heads": 2, "kv_heads": 1}
    return randomised(BLT(blt_config(encoder=grouped, decoder=grouped))).double()


def small_entropy_model() -> EntropyModel:
    return randomised(EntropyModel(EntropyModelConfig(transformer=transformer_config(layers=2, window=150)))).double()


def outcome(model: nn.Module) -> tuple[Tensor, list[Tensor]]:
    """Logits and gradients."""
    lengths = (BATCH.patch_lengths,) if isinstance(model, BLT) else ()
    logits = model(BATCH.byte_ids, *lengths, BATCH.document_ids)
    model.zero_grad()
    summed_cross_entropy(logits, BATCH.targets).backward()
    return logits.detach(), [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def assert_same_outcome(found: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]]) -> None:
    """In float64 only the order of sums differs; gradients add up 800 bytes of it."""
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-11)
    assert len(found[1]) == len(expected[1]) > 0
    torch.testing.assert_close(found[1], expected[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("build", "layers", "masks"), [(small_blt, 5, 2), (small_entropy_model, 2, 1)])
def test_whole_models_are_the_same(build: Callable[[], nn.Module], layers: int, masks: int) -> None:
    """Forward and gradients; every layer goes through it, those over the same places with one mask."""
    model = build()
    expected = outcome(model)
    with flex_forced() as used:
        found = outcome(model)
    assert len(used) == layers
    assert len({id(mask) for mask in used}) == masks
    assert_same_outcome(found, expected)


def test_streamed_entropies_are_the_same() -> None:
    """Chunks that do not divide the document, after the keys carried from the window before them."""
    config = EntropyModelConfig(transformer=transformer_config(layers=2, window=150))
    model = randomised(EntropyModel(config))
    documents = [bytes(range(256)) * 3, b"short", b""]
    expected = document_entropies(model, documents, row_bytes=190)
    with flex_forced() as used:
        found = document_entropies(model, documents, row_bytes=190)
    assert any(mask.shape[-1] > mask.shape[-2] for mask in used)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # float32 nats


@pytest.mark.parametrize("recomputation", ["selective", "full"])
def test_recomputation_goes_through_it_again(recomputation: Recomputation) -> None:
    model = small_blt()
    expected = outcome(model)
    recompute_blocks(model, recomputation)
    with flex_forced() as used:
        found = outcome(model)
    assert len(used) == 2 * 5
    assert_same_outcome(found, expected)


def sharded_through_it() -> Trace:
    with flex_forced() as used:
        trace = sharded_steps("blt", "selective")
    assert used
    return trace


def bfloat16_through_it() -> tuple[list[float], torch.dtype]:
    with flex_forced() as used:
        found = loss_in_bfloat16()
    assert used
    return found


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_sharded_steps_are_those_of_the_whole_model_in_bands() -> None:
    """FSDP2 over two gloo ranks with selective recomputation; in float32, to the tolerances of the other path."""
    nats, norms, weights = whole_steps("blt")
    for found_nats, found_norms, found_weights in run_ranks(2, sharded_through_it):
        assert found_nats == pytest.approx(nats, rel=1e-5)
        assert found_norms == pytest.approx(norms, rel=1e-5)
        for name, weight in weights.items():
            torch.testing.assert_close(found_weights[name], weight, atol=1e-4, rtol=0, msg=name)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_sharded_bfloat16_keeps_float32_weights_and_stays_near_float32() -> None:
    """Under autocast; bfloat16 has 8 bits."""
    expected, _, _ = whole_steps("blt")
    for nats, dtype in run_ranks(2, bfloat16_through_it):
        assert dtype == torch.float32
        assert nats == pytest.approx(expected, rel=1e-2)
