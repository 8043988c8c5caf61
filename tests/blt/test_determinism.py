"""Deterministic mode (torch.use_deterministic_algorithms): training steps run under it and repeat bit for bit.

A GPU is not at hand, but which operations CUDA refuses in this mode is documented, and training has one code path for
all devices: what it asks of torch is recorded here on CPU and held to that list.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from blt.entropy_model import EntropyModel, EntropyModelConfig
from blt.model import BLT
from blt.optim import OptimizerConfig, build_optimizer
from blt.parallel import FlatGradients
from blt.recomputation import Recomputation, recompute_blocks
from blt.step import train_step
from tests.blt.test_step import joined, rows_of
from tests.model_cases import blt_config, randomised, transformer_config

MODELS: dict[str, Callable[[], nn.Module]] = {
    "blt": lambda: BLT(blt_config()),
    "mean pooling": lambda: BLT(blt_config(cross={"pooling": "mean", "encoder_layers": "all"})),
    "min pooling alone": lambda: BLT(
        blt_config(cross={"pooling": "min", "encoder_layers": "none", "decoder_layers": "none", "slots": 1})
    ),
    "entropy_model": lambda: EntropyModel(EntropyModelConfig(transformer=transformer_config())),
}


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def trained(name: str, recomputation: Recomputation, steps: int) -> tuple[list[float], dict[str, Tensor]]:
    """Nats of each step, and the weights after them."""
    model = randomised(MODELS[name]())
    recompute_blocks(model, recomputation)
    optimizer, gradients = build_optimizer(model, OptimizerConfig(lr=1e-2)), FlatGradients(model.parameters())
    kind = "entropy_model" if name == "entropy_model" else "blt"
    nats = []
    for step in range(steps):
        rows = rows_of(kind, step)
        batches = [joined(rows[:3]), joined(rows[3:])]
        nats.append(train_step(model, optimizer, gradients, batches, clip_norm=0.5).tally.nats)
    return nats, {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize(
    ("name", "recomputation"), [*((name, "none") for name in MODELS), ("blt", "selective"), ("blt", "full")]
)
def test_steps_repeat_bit_for_bit(name: str, recomputation: Recomputation) -> None:
    first, second = (trained(name, recomputation, steps=2) for _ in range(2))
    assert first[0] == second[0]
    assert first[0][0] != first[0][1]
    assert all(torch.equal(first[1][weight], second[1][weight]) for weight in first[1])


class Refused(TorchDispatchMode):
    """Collects the operations that CUDA refuses in deterministic mode. Source: torch.use_deterministic_algorithms,
    without those on images and volumes; of NLLLoss it is the form for images (nll_loss2d) that is refused."""

    NAMES = ("_ctc_loss", "bincount", "histc", "index_reduce", "kthvalue", "median", "nll_loss2d_forward", "put")

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__.removesuffix("_")
        self.seen.add(name)
        sums_reals = name in ("cumsum", "cumprod") and args[0].is_floating_point()
        multiplies = name == "scatter_reduce" and "prod" in args
        takes_most = name in ("_embedding_bag", "_embedding_bag_forward_only") and 2 in args[4:5]  # mode="max"
        if name in self.NAMES or sums_reals or multiplies or takes_most:
            self.found.add(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", MODELS)
def test_training_asks_for_nothing_that_cuda_would_refuse(name: str) -> None:
    with Refused() as refused:
        trained(name, "none", steps=1)
    assert refused.found == set()
    assert {"bmm", "embedding_dense_backward", "nll_loss_backward", "_fused_adamw"} <= refused.seen, "whole steps"
    if name != "entropy_model":
        assert {"_embedding_bag_backward", "scatter_add", "gather"} <= refused.seen


def test_what_cuda_would_refuse_is_seen() -> None:
    ids, rows = torch.tensor([[0, 1]]), torch.rand(2, 3)
    with Refused() as refused:
        rows.cumsum(0)
        rows.scatter_reduce(0, ids, rows, "prod")
        nn.functional.embedding_bag(ids, rows.clone().requires_grad_(), mode="max")
        ids.flatten().bincount()
        rows.median()
    assert refused.found == {"cumsum", "scatter_reduce", "_embedding_bag", "bincount", "median"}
    with Refused() as refused:
        ids.cumsum(0)
        rows.scatter_reduce(0, ids, rows, "amax")
        nn.functional.embedding_bag(ids, rows.clone().requires_grad_(), mode="sum")
    assert refused.found == set()
