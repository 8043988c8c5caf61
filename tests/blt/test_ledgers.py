"""The ledgers of memory and traffic are what ranks of a real group hold and send, byte for byte."""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from blt.activations import ActivationBytes, Computation, Stretch, activation_bytes, lookup_bytes
from blt.column_embedding import ColumnHashEmbedding
from blt.entropy_model import EntropyModel, EntropyModelConfig
from blt.hash_embedding import HashEmbedding
from blt.layers import TransformerConfig
from blt.local_encoder import CrossAttentionConfig, HashEmbeddingConfig
from blt.memory_ledger import MemoryLedger, Spread, memory_ledger, parameters_by_part
from blt.model import BLT, BLTConfig
from blt.optim import OptimizerConfig, build_optimizer
from blt.parallel import FlatGradients
from blt.recomputation import Recomputation, blocks_of
from blt.sharding import ShardedGradients, load_full, sharded
from blt.step import Batch, StepCounts, accumulate
from blt.traffic_ledger import TrafficLedger, traffic_ledger
from blt.training_tensors import training_tensors
from tests.blt.test_activations import micro_batch, most_allocated
from tests.blt.test_step import rows_of
from tests.gloo import run_ranks
from tests.model_cases import blt_config, randomised, transformer_config

Kind = Literal["blt", "entropy_model"]
MICRO_STEPS = 2
WIDTHS = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def build(kind: Kind) -> BLT | EntropyModel:
    return BLT(blt_config()) if kind == "blt" else EntropyModel(EntropyModelConfig(transformer=transformer_config()))


def micro_batches(kind: Kind) -> list[Batch]:
    """Those of an update on every rank: all of the same number of bytes."""
    return rows_of(kind, 0)[:1] * MICRO_STEPS


class SentBytes(TorchDispatchMode):
    """Bytes that this rank sends in every collective, by the type of what is sent; collectives count as rings."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, others = str(func), dist.get_world_size() - 1
        if "_allgather_base_" in name:
            self.sent[f"gathered {args[1].dtype}"] += others * args[1].nbytes
        elif "_reduce_scatter_base_" in name:
            self.sent[f"summed {args[1].dtype}"] += others * args[0].nbytes
        elif "all_to_all_single" in name:
            own = args[2][dist.get_rank()]
            self.sent[f"exchanged {args[0].dtype}"] += (sum(args[2]) - own) * args[0].itemsize
        else:
            assert "allreduce" not in name, name
        return func(*args, **(kwargs or {}))


def wide_shape() -> BLTConfig:
    """Blocks of which one, gathered, is a third of the activations."""
    local = TransformerConfig(width=256, layers=1, heads=4, ffn_multiple_of=32, window=64)
    return BLTConfig(
        local_encoder=local,
        latent=TransformerConfig(width=768, layers=3, heads=4, ffn_multiple_of=32, window=None),
        local_decoder=replace(local, layers=3),
        cross_attention=CrossAttentionConfig(heads=4, slots=2),
        hash_embedding=HashEmbeddingConfig(group_sizes=(3, 4), table_size=5001),
    )


def allocated(recomputation: Recomputation) -> int:
    """The most that the allocator gave out at any time of a micro-batch on this rank, the second of an update."""
    mesh, shape = init_device_mesh("cpu", (dist.get_world_size(),)), wide_shape()
    model = sharded(lambda: BLT(shape), mesh, recomputation=recomputation)
    load_full(model, BLT(shape).state_dict() if dist.get_rank() == 0 else None)
    counts = StepCounts(torch.device("cpu"))
    accumulate(model, counts, [micro_batch("blt")])
    return most_allocated(lambda: accumulate(model, counts, [micro_batch("blt")]))


@pytest.mark.slow
@pytest.mark.parametrize("recomputation", ["none", "full"])
def test_a_sharded_rank_takes_at_most_what_the_ledger_says(recomputation: Recomputation) -> None:
    """To 3 %: numbers of a few bytes for each byte of text. By one rank: more exchange their weights in threads of
    gloo's, which free memory unseen by the allocator's records.
    """
    with torch.device("meta"):
        model = BLT(wide_shape())
    tables, batch = model.local_encoder.hash_embedding, micro_batch("blt")
    assert isinstance(tables, HashEmbedding)
    memory = memory_ledger(
        model,
        ranks=1,
        spread="sharded",
        gathered=torch.float32,
        activations=activation_bytes(wide_shape(), batch, Computation(device="cpu", recomputation=recomputation)),
        lookups=lookup_bytes(tables, batch),
        accumulates=True,
    )
    gathered = memory.working.gathered_weights + memory.working.gathered_gradients
    assert gathered > 0.05 * memory.working.total, "else it says nothing of what is gathered"
    assert run_ranks(1, allocated, recomputation) == [pytest.approx(memory.working.total, rel=0.03)]


@dataclass(frozen=True)
class Rank:
    """What a rank held after an update, and sent in it; what lookups in split tables keep on it."""

    weights: int
    gradients: int
    moments: int
    sent: dict[str, int]
    lookups: int


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def held_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, int, int]:
    tensors = training_tensors(model, optimizer)
    sizes: Counter[str] = Counter()
    for name, tensor in tensors.items():
        sizes["weights" if name.startswith("model.") else "moments"] += local(tensor).nbytes
    gradients = sum(local(parameter.grad).nbytes for parameter in model.parameters() if parameter.grad is not None)
    return sizes["weights"], gradients, sizes["moments"]


def sharded_rank(kind: Kind, precision: Literal["float32", "bfloat16"]) -> Rank:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = sharded(lambda: build(kind), mesh, precision=precision)
    load_full(model, randomised(build(kind)).state_dict() if dist.get_rank() == 0 else None)
    optimizer, gradients = build_optimizer(model, OptimizerConfig()), ShardedGradients(model, mesh)
    gradients.zero()
    autocast = torch.bfloat16 if precision == "bfloat16" else None
    with SentBytes() as traffic:
        accumulate(model, StepCounts(torch.device("cpu")), micro_batches(kind), autocast)
    return Rank(*held_bytes(model, optimizer), dict(traffic.sent), kept_by(ColumnHashEmbedding(lookup_tables(), mesh)))


def ledgers(kind: Kind, ranks: int, gathered: torch.dtype, spread: Spread) -> tuple[MemoryLedger, TrafficLedger]:
    with torch.device("meta"):
        model = build(kind)
    nothing = ActivationBytes(kept=0, forward=Stretch(0, 0), backward=(Stretch(0, 0),) * len(blocks_of(model)))
    memory = memory_ledger(
        model, ranks=ranks, spread=spread, gathered=gathered, activations=nothing, lookups=0, accumulates=True
    )
    traffic = traffic_ledger(
        model,
        ranks=ranks,
        spread=spread,
        gathered=gathered,
        micro_steps=MICRO_STEPS,
        micro_batch_bytes=micro_batches(kind)[0].byte_ids_BT.numel(),
    )
    return memory, traffic


@pytest.mark.parametrize(
    ("kind", "ranks", "gathered"),
    [
        ("blt", 3, torch.bfloat16),  # 3 divides neither the widths nor most numbers of rows
        pytest.param("blt", 2, torch.float32, marks=pytest.mark.slow),
        pytest.param("entropy_model", 2, torch.float32, marks=pytest.mark.slow),
    ],
)
def test_a_sharded_rank_holds_and_sends_what_the_ledgers_say(kind: Kind, ranks: int, gathered: torch.dtype) -> None:
    found = run_ranks(ranks, sharded_rank, kind, WIDTHS[gathered])
    memory, traffic = ledgers(kind, ranks, gathered, "sharded")
    first = found[0]
    assert (memory.weights, memory.gradients, memory.moments) == (first.weights, first.gradients, first.moments)
    assert memory.weights == max(rank.weights for rank in found), "rank 0 holds most"
    expected = {
        f"gathered {gathered}": traffic.weights,
        "summed torch.float32": traffic.gradients,
        "gathered torch.int64": traffic.tables.row_numbers,
        "exchanged torch.float32": traffic.tables.sums,
    }
    assert first.sent == {name: sent for name, sent in expected.items() if sent}
    assert traffic.total == sum(first.sent.values())
    assert first.lookups == ranks * kept_by(lookup_tables()), "as much again for the bytes of every rank"


def test_a_replicated_rank_holds_what_the_ledger_says() -> None:
    model = build("blt")
    optimizer, gradients = build_optimizer(model, OptimizerConfig()), FlatGradients(model.parameters())
    memory, traffic = ledgers("blt", 3, torch.float32, "replicated")
    weights, grads, moments = held_bytes(model, optimizer)
    assert (memory.weights, memory.gradients, memory.moments) == (weights, grads, moments)
    assert gradients.buffer.nbytes == memory.gradients
    assert traffic.total == 2 * 2 * gradients.buffer.nbytes // 3, "a ring sends all but its own part, twice"


def kept_by(embedding: HashEmbedding) -> int:
    """Bytes that lookups keep for the backward pass, the table apart. Asked of autograd, since gloo's threads may still
    hold what was sent.
    """
    batch, kept = micro_batches("blt")[0].to(torch.device("cpu")), dict[int, int]()

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = embedding(batch.byte_ids_BT, batch.document_ids_BT)  # noqa: F841  # its graph holds what is counted
    kept.pop(local(embedding.table).untyped_storage().data_ptr(), None)
    return sum(kept.values())


def lookup_tables() -> HashEmbedding:
    return HashEmbedding(group_sizes=(2, 3, 4), functions=2, table_size=11, width=16)


def test_lookups_keep_what_is_counted_for_them() -> None:
    """And for each lookup whose it is, as CUDA's kernel and the meta device's note, where CPU's has a number a byte."""
    batch = micro_batches("blt")[0]
    num_bytes, lookups = batch.byte_ids_BT.numel(), 6
    assert lookup_bytes(lookup_tables(), batch) == kept_by(lookup_tables()) + num_bytes * (lookups - 1) * 8


def test_every_parameter_is_in_one_part() -> None:
    model = build("blt")
    parts = parameters_by_part(model)
    assert sum(parts.values()) == sum(parameter.numel() for parameter in model.parameters())
    assert all(parts.values())
    table = model.local_encoder.hash_embedding
    assert isinstance(table, HashEmbedding)
    assert parts["hash_tables"] == table.table.numel()
    assert list(parameters_by_part(build("entropy_model"))) == ["transformer"]


def test_one_rank_sends_nothing_and_more_ranks_hold_less() -> None:
    alone, traffic = ledgers("blt", 1, torch.float32, "sharded")
    assert traffic.total == 0
    shared = [ledgers("blt", ranks, torch.float32, "sharded")[0] for ranks in (2, 4, 8)]
    states = [alone.state, *(memory.state for memory in shared)]
    assert states == sorted(states, reverse=True)
    assert alone.state == ledgers("blt", 1, torch.float32, "replicated")[0].state


def test_a_row_exchange_would_send_as_many_times_more_as_there_are_lookups() -> None:
    """Here two of a byte; their row numbers go to the one rank that has the row."""
    tables, lookups = ledgers("blt", 2, torch.float32, "sharded")[1].tables, 2
    numbers = MICRO_STEPS * micro_batches("blt")[0].byte_ids_BT.numel() * lookups * 8
    assert tables.by_rows == lookups * tables.sums + numbers // 2
    assert tables.by_columns == tables.sums + numbers + MICRO_STEPS * 8
