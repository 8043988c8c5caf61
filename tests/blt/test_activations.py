"""Activations counted without computing anything are those of a real forward and backward pass on CPU.

Held to what autograd's hooks see saved, and to the allocator's own books, which know of everything. What differs are
tensors of a few numbers for each byte: where documents and patches are is checked with, and lookups that are counted
for CUDA's kernel; 1 % is room for them at the widths here, where an attention layer counted wrongly would be 5 %.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from blt.activations import Computation, activation_bytes, lookup_bytes
from blt.entropy_model import EntropyModel, EntropyModelConfig
from blt.hash_embedding import HashEmbedding
from blt.layers import TransformerConfig
from blt.live_bytes import LiveBytes
from blt.local_encoder import CrossAttentionConfig, HashEmbeddingConfig
from blt.meta_kernels import NARROWED, SUMMED_IN_FLOAT32_ON_CUDA, WIDENED_ON_CUDA, AsOn
from blt.model import BLT, BLTConfig
from blt.recomputation import Recomputation, recompute_blocks
from blt.step import Batch, tally_batch
from tests.model_cases import packed_batch

LOCAL = TransformerConfig(width=64, layers=1, heads=4, ffn_multiple_of=32, window=64)
SHAPES: dict[str, BLTConfig | EntropyModelConfig] = {
    "blt": BLTConfig(
        local_encoder=LOCAL,
        latent=TransformerConfig(width=96, layers=3, heads=4, kv_heads=2, ffn_multiple_of=32, window=None),
        local_decoder=replace(LOCAL, layers=2),
        cross_attention=CrossAttentionConfig(heads=4, slots=2),
        hash_embedding=HashEmbeddingConfig(group_sizes=(3, 4, 5), table_size=101),
    ),
    "entropy_model": EntropyModelConfig(transformer=replace(LOCAL, layers=3)),
}
TOLERANCE = 0.01


def micro_batch(kind: str) -> Batch:
    """Rows of several documents, which no part of the forecast knows of."""
    packed = packed_batch([[300, 150], [449], [120, 7, 310]])
    assert packed.document_ids is not None
    return Batch(
        byte_ids_BT=packed.byte_ids,
        targets_BT=packed.targets,
        document_ids_BT=packed.document_ids,
        patch_lengths_BP=packed.patch_lengths if kind == "blt" else None,
    )


def real_model(kind: str, recomputation: Recomputation) -> nn.Module:
    shape = SHAPES[kind]
    model = BLT(shape) if isinstance(shape, BLTConfig) else EntropyModel(shape)
    recompute_blocks(model, recomputation)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    return model


def counted(kind: str, how: Computation) -> tuple[int, int]:
    """What is kept, and the most at any time, as the ledger has it."""
    found, batch = activation_bytes(SHAPES[kind], micro_batch(kind), how), micro_batch(kind)
    model = real_model(kind, "none")
    tables = model.local_encoder.hash_embedding if isinstance(model, BLT) else None
    lookups = lookup_bytes(tables, batch) if isinstance(tables, HashEmbedding) else 0
    return found.kept + lookups, found.peak + lookups


def saved_bytes(kind: str, how: Computation) -> int:
    """What autograd saves in a real forward pass, parameters left out."""
    model, batch = real_model(kind, how.recomputation), micro_batch(kind)
    storages = {}
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        nats, _, _ = tally_batch(model, batch, how.autocast)
    found = sum(storage.nbytes() for pointer, storage in storages.items() if pointer not in known)
    nats.backward()
    return found


def allocated_bytes(kind: str, how: Computation) -> int:
    """The most that CPU's allocator gave out at any time of a real forward and backward pass."""
    model, batch = real_model(kind, how.recomputation), micro_batch(kind)
    return most_allocated(lambda: tally_batch(model, batch, how.autocast)[0].backward())


def most_allocated(work: Callable[[], None]) -> int:
    """The most bytes that CPU's allocator gave out at any time of the work, less those that it took back."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    results = recorded.profiler.kineto_results  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


@pytest.mark.parametrize("recomputation", ["none", "full"])
@pytest.mark.parametrize("kind", sorted(SHAPES))
def test_what_is_kept_is_what_autograd_saves(kind: str, recomputation: Recomputation) -> None:
    how = Computation(device="cpu", recomputation=recomputation)
    kept = counted(kind, how)[0]
    # A block that is computed again keeps its input and, beside what is saved, a reference to where its bytes stand.
    assert kept == pytest.approx(saved_bytes(kind, how), rel=TOLERANCE if recomputation == "none" else 0.04)


@pytest.mark.parametrize(
    ("kind", "recomputation", "autocast"),
    [
        ("blt", "none", None),
        ("blt", "selective", torch.bfloat16),
        ("entropy_model", "full", None),
        pytest.param("blt", "none", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("blt", "selective", None, marks=pytest.mark.slow),
        pytest.param("blt", "full", None, marks=pytest.mark.slow),
        pytest.param("entropy_model", "none", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("entropy_model", "selective", None, marks=pytest.mark.slow),
        pytest.param("entropy_model", "full", torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_the_most_at_any_time_is_what_the_allocator_gives_out(
    kind: str, recomputation: Recomputation, autocast: torch.dtype | None
) -> None:
    how = Computation(device="cpu", recomputation=recomputation, autocast=autocast)
    assert counted(kind, how)[1] == pytest.approx(allocated_bytes(kind, how), rel=TOLERANCE)


def test_recomputation_keeps_less_and_a_kernel_of_its_own_too() -> None:
    kinds: tuple[Recomputation, ...] = ("none", "selective", "full")
    for device in ("cpu", "cuda"):
        kept = [counted("blt", Computation(device=device, recomputation=kind))[0] for kind in kinds]
        assert kept == sorted(kept, reverse=True)
    on_cpu, on_cuda = (counted("blt", Computation(device=device))[0] for device in ("cpu", "cuda"))
    assert on_cuda < on_cpu, "CPU's RMSNorm keeps what it makes on the way"


def test_whole_weights_are_cast_for_each_product_and_gathered_ones_are_not() -> None:
    """Autocast keeps a narrow copy of every matrix that is wide, and for RMSNorm a wide one of every narrow vector."""
    narrow = Computation(autocast=torch.bfloat16, gathered=torch.bfloat16)
    parameters = list(real_model("entropy_model", "none").parameters())
    matrices = sum(parameter.numel() for parameter in parameters[1:] if parameter.dim() == 2)  # without the embedding
    vectors = sum(parameter.numel() for parameter in parameters if parameter.dim() == 1)
    gathered, whole = (counted("entropy_model", how)[0] for how in (narrow, replace(narrow, gathered=torch.float32)))
    assert whole - gathered == 2 * matrices - 4 * vectors


def test_more_rows_take_more_in_proportion() -> None:
    packed = packed_batch([[449]])
    assert packed.document_ids is not None
    one = Batch(
        byte_ids_BT=packed.byte_ids,
        targets_BT=packed.targets,
        document_ids_BT=packed.document_ids,
        patch_lengths_BP=packed.patch_lengths,
    )
    three = Batch(**{name: getattr(one, name).expand(3, -1) for name in vars(one)})
    found = [activation_bytes(SHAPES["blt"], batch, Computation()).kept for batch in (one, three)]
    assert found[1] == pytest.approx(3 * found[0], rel=1e-3)


def test_casts_are_those_of_autocast() -> None:
    """The lists hold what torch's header has under the same heading."""
    header = Path(torch.__file__).parent / "include/ATen/autocast_mode.h"
    text = header.read_text()

    def listed(macro: str) -> set[str]:
        body = re.search(rf"#define {macro}\(_\)((?:.*\\\n)+.*)", text)
        assert body is not None
        return set(re.findall(r"_\((\w+)", body.group(1)))

    assert listed("AT_FORALL_LOWER_PRECISION_FP") >= NARROWED
    assert listed("AT_FORALL_FP32") >= WIDENED_ON_CUDA
    assert listed("AT_FORALL_FP32_SET_OPT_DTYPE") >= SUMMED_IN_FLOAT32_ON_CUDA


def test_types_on_the_meta_device_are_those_of_the_device() -> None:
    x = torch.empty(2, 8, device="meta", dtype=torch.bfloat16)
    weight = torch.empty(8, 8, device="meta")
    with AsOn("cuda", torch.bfloat16):
        assert nn.functional.linear(x.float(), weight).dtype == torch.bfloat16
        assert nn.functional.rms_norm(x, (8,), weight[0], 1e-5).dtype == torch.float32
        assert (x.exp().dtype, x.sum(1).dtype, x.sum(1, dtype=torch.bfloat16).dtype) == (
            torch.float32,
            torch.float32,
            torch.bfloat16,
        )
        assert (x * x).dtype == torch.bfloat16
    with AsOn("cpu", torch.bfloat16):
        assert nn.functional.linear(x.float(), weight).dtype == torch.bfloat16
        assert x.exp().dtype == torch.bfloat16


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_live_bytes_count_a_storage_once_until_nobody_holds_it(device: str) -> None:
    weight = torch.zeros(1000, requires_grad=True, device=device)
    with LiveBytes([weight]) as live:
        product = weight * 2
        view = product[10:]
        assert live.bytes == 4000
        powers = product.exp()
        del product, view
        assert live.bytes == 4000, "exp keeps its result, the product nothing but the weight"
        assert live.lap() == 8000
        total = powers.sum()
        del powers
        assert (live.bytes, live.lap()) == (4004, 4004)
        total.backward()
        del total
        assert (live.bytes, live.lap()) == (4000, 8008), "the gradient; on its way, that of the product and two numbers"
