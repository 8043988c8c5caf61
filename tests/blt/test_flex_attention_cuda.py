"""What CUDA compiles for FlexAttention, held to the banded path on CPU; whole models, entropies and FSDP2 steps held to
theirs on CPU: `pytest -m gpu tests/blt/test_flex_attention_cuda.py`.
"""

from collections.abc import Callable, Iterator
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from blt import flex_attention
from blt.attention import causal_spans
from blt.entropy_model import EntropyModel, EntropyModelConfig, document_entropies
from blt.flex_attention import Turns, block_mask, compiled_attention, flex_fits
from blt.layers import context
from blt.loss import summed_cross_entropy
from blt.model import BLT
from blt.optim import OptimizerConfig, build_optimizer
from blt.recomputation import Recomputation, prepare_blocks
from blt.sharding import ShardedGradients, load_full, sharded
from blt.step import train_step
from tests.blt.test_flex_attention import BATCH, documents_of, rotated_bands, turns_of
from tests.blt.test_step import rows_of
from tests.gloo import run_ranks
from tests.model_cases import blt_config, randomised, transformer_config

DEVICE = "cuda"
BACKEND = "nccl"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),  # the first kernel of a kind takes the compiler some seconds
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def none_refused() -> Iterator[None]:
    """A warning about what could not be compiled is a failure here."""
    flex_attention._refused.clear()
    yield
    assert not flex_attention._refused


def on_device(turns: Turns) -> Turns:
    return turns[0].to(DEVICE), turns[1].to(DEVICE)


def assert_kernel_is_right(
    document_ids: Tensor, window: int | None, carried: int, heads: tuple[int, int], width: int, dtype: torch.dtype
) -> None:
    """Values and gradients, from inputs that the dtype holds exactly. float32: sums in another order, exponentials by
    powers of two. bfloat16: probabilities and results have 8 bits."""
    (rows, length), generator = document_ids.shape, torch.Generator().manual_seed(document_ids.shape[1])
    sizes = ((rows, length, heads[0]), *((rows, length + carried, heads[1]),) * 2)
    drawn = [torch.randn(*size, width, generator=generator).to(dtype) for size in sizes]
    expected_qkv = [x.float().requires_grad_() for x in drawn]
    expected = rotated_bands(*expected_qkv, causal_spans(document_ids, window, carried))
    qkv = [x.to(DEVICE).requires_grad_() for x in drawn]
    assert flex_fits(qkv[0])
    mask = block_mask(causal_spans(document_ids.to(DEVICE), window, carried))
    found = compiled_attention(*qkv, on_device(turns_of(length, carried, width)), mask)
    assert found is not None
    assert found.dtype == dtype
    exact = dtype == torch.float32
    bound = 1e-5 if exact else 2**-6
    torch.testing.assert_close(found.float().cpu(), expected, rtol=bound, atol=bound)
    weight = torch.randn(expected.shape, generator=generator).to(dtype)
    grads = torch.autograd.grad(found, qkv, weight.to(DEVICE))
    for ours, theirs in zip(grads, torch.autograd.grad(expected, expected_qkv, weight.float()), strict=True):
        assert ours.dtype == dtype
        # Beside the gradient's norm, or that of entries of 1/2 where everything cancels, as for a single key.
        norm = max(float(theirs.norm()), 0.5 * theirs.numel() ** 0.5)
        assert float((ours.float().cpu() - theirs).norm()) < (1e-5 if exact else 0.02) * norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("carried", "kv_heads"), [(0, 4), (0, 1), (37, 2)])
@pytest.mark.parametrize("length", [1, 127, 128, 129, 700])
@pytest.mark.parametrize("window", [None, 1, 7, 128, 512])
def test_kernels_equal_the_banded_path(
    window: int | None, length: int, carried: int, kv_heads: int, dtype: torch.dtype
) -> None:
    assert_kernel_is_right(documents_of(length), window, carried, (4, kv_heads), 16, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [16, 24, 64, 80, 96, 128])
def test_widths_of_heads(width: int, dtype: torch.dtype) -> None:
    """Those of the published sizes among them, and some that are no power of two."""
    assert_kernel_is_right(documents_of(300), 100, 0, (4, 2), width, dtype)


@pytest.mark.parametrize(("width", "dtype"), [(8, torch.float32), (64, torch.float64)])
def test_what_the_kernels_do_not_take_goes_in_bands(width: int, dtype: torch.dtype) -> None:
    config = transformer_config(width=2 * width, heads=2)
    document_ids = documents_of(200)
    qkv = tuple(torch.randn(3, 200, 2, width, dtype=dtype, generator=torch.Generator().manual_seed(0)) for _ in "qkv")
    on_device = tuple(x.to(DEVICE) for x in qkv)
    assert not flex_fits(on_device[0])
    found = context(config, document_ids.to(DEVICE)).attend_to(*on_device)
    torch.testing.assert_close(found.cpu(), context(config, document_ids).attend_to(*qkv), rtol=1e-5, atol=1e-5)


def test_a_long_row_needs_no_scores_of_all_pairs() -> None:
    """Forward and backward; 32768 x 32768 scores of 4 heads would be 17 GB in float32, 8 GB in bfloat16."""
    length = 32768
    spans = causal_spans(torch.arange(length, device=DEVICE)[None] // 10_000, None)
    qkv = tuple(torch.randn(1, length, 4, 64, device=DEVICE, dtype=torch.bfloat16).requires_grad_() for _ in "qkv")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = compiled_attention(*qkv, on_device(turns_of(length, 0, 64)), block_mask(spans))
    assert found is not None
    found.sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 1e9


def wide_blt() -> BLT:
    """Heads of 16 and 32."""
    local: dict[str, object] = {"width": 32, "window": 150, "kv_heads": 1}
    return randomised(BLT(blt_config(encoder=local, decoder=local, latent={"width": 64})))


def wide_entropy_model() -> EntropyModel:
    return randomised(EntropyModel(EntropyModelConfig(transformer=transformer_config(width=32, layers=2, window=150))))


def outcome(model: nn.Module) -> tuple[Tensor, list[Tensor]]:
    """Logits and gradients on the CPU."""
    batch, device = BATCH, next(model.parameters()).device
    inputs = [batch.byte_ids, *([batch.patch_lengths] if isinstance(model, BLT) else []), batch.document_ids]
    logits = model(*(None if x is None else x.to(device) for x in inputs))
    summed_cross_entropy(logits, batch.targets.to(device)).backward()
    return logits.detach().cpu(), [p.grad.cpu() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("build", [wide_blt, wide_entropy_model])
@pytest.mark.parametrize(
    ("recomputation", "compile"), [("none", False), ("selective", False), ("selective", True), ("full", True)]
)
def test_whole_models(build: Callable[[], nn.Module], recomputation: Recomputation, compile: bool) -> None:
    """float32: logits of some units to 1e-4, gradients to 1e-4 of their largest entry."""
    logits, grads = outcome(build())
    model = build().to(DEVICE)
    prepare_blocks(model, recomputation, compile)
    found_logits, found_grads = outcome(model)
    assert flex_attention._compiled.cache_info().currsize == 1
    torch.testing.assert_close(found_logits, logits, rtol=0, atol=1e-4)
    for ours, theirs in zip(found_grads, grads, strict=True):
        assert float((ours - theirs).abs().max()) <= 1e-4 * max(float(theirs.abs().max()), 1.0)


def test_streamed_entropies() -> None:
    """Chunks after carried keys: within the 1e-4 nats that a document's entropies may differ by."""
    model, documents = wide_entropy_model(), [bytes(range(256)) * 5, b"short", b""]
    expected = document_entropies(model, documents, row_bytes=190)
    found = document_entropies(model.to(DEVICE), documents, row_bytes=190)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def sharded_steps(device: str, precision: Literal["float32", "bfloat16"]) -> tuple[list[float], list[float]]:
    """Nats and gradient norms of three steps of an FSDP2 model on a mesh of one device."""
    if device == "cuda":
        torch.cuda.set_device(0)
    mesh = init_device_mesh(device, (1,))
    model = sharded(wide_blt, mesh, precision=precision, recomputation="selective")
    load_full(model, wide_blt().state_dict())
    optimizer, gradients = build_optimizer(model, OptimizerConfig(lr=1e-3)), ShardedGradients(model, mesh)
    autocast = torch.bfloat16 if precision == "bfloat16" else None
    results = [
        train_step(model, optimizer, gradients, rows_of("blt", step), clip_norm=0.5, autocast=autocast)
        for step in range(3)
    ]
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert (flex_attention._compiled.cache_info().currsize == 1) == (device == "cuda")
    assert not flex_attention._refused
    return [result.tally.nats for result in results], [result.grad_norm for result in results]


@pytest.mark.parametrize(("precision", "bound"), [("float32", 1e-4), ("bfloat16", 1e-2)])
def test_sharded_steps_equal_those_on_cpu(precision: Literal["float32", "bfloat16"], bound: float) -> None:
    """Either precision against float32 on CPU; bfloat16 has 8 bits, and gradients add their errors up."""
    ((nats, norms),) = run_ranks(1, sharded_steps, "cpu", "float32")
    ((found_nats, found_norms),) = run_ranks(1, sharded_steps, DEVICE, precision, backend=BACKEND)
    assert found_nats == pytest.approx(nats, rel=bound)
    assert found_norms == pytest.approx(norms, rel=5 * bound)
