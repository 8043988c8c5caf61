"""No tensor of N x N, N x P or P x P elements, forward or backward, and the largest grows as the row does.

A dispatch mode sees every tensor that any operation makes, those of custom autograd functions and of the backward pass
included. Every byte is a patch here, so N x N, N x P and P x P are one number, far above the logits' N x 260.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from blt.entropy_model import EntropyModel, EntropyModelConfig, document_entropies
from blt.loss import summed_cross_entropy
from blt.model import BLT
from tests.model_cases import blt_config, packed_batch, transformer_config

LENGTH = 3072


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements of any tensor made (views of it too) while the mode is on."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0
        self.operation = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.numel() > self.num_elements:
                self.num_elements, self.operation = leaf.numel(), str(func)
        return out


def largest_of(work: Callable[[], object]) -> LargestTensor:
    with LargestTensor() as largest:
        work()
    return largest


def documents_of(length: int, documents: int) -> list[int]:
    return [length // documents] * documents


def train_blt(length: int, documents: int, pooling: str) -> LargestTensor:
    config = blt_config(
        encoder={"window": 64},
        decoder={"window": 64},
        latent={"layers": 1},
        cross={"encoder_layers": "all", "pooling": pooling},
    )
    model = BLT(config)
    batch = packed_batch([documents_of(length, documents)], start_rate=1.0)

    def step() -> None:
        logits = model(batch.byte_ids, batch.patch_lengths, batch.document_ids)
        summed_cross_entropy(logits, batch.targets).backward()

    return largest_of(step)


def train_entropy_model(length: int, documents: int) -> LargestTensor:
    model = EntropyModel(EntropyModelConfig(transformer=transformer_config(window=64)))
    batch = packed_batch([documents_of(length, documents)])
    return largest_of(lambda: summed_cross_entropy(model(batch.byte_ids, batch.document_ids), batch.targets).backward())


@pytest.mark.parametrize(("documents", "pooling"), [(1, "max"), (8, "mean")])
def test_blt_is_linear_in_the_row(documents: int, pooling: str) -> None:
    short, long = train_blt(LENGTH, documents, pooling), train_blt(2 * LENGTH, documents, pooling)
    assert short.num_elements < LENGTH * LENGTH / 8, short.operation
    assert long.num_elements <= 2 * short.num_elements + 1000, long.operation


@pytest.mark.parametrize("documents", [1, 8])
def test_entropy_model_is_linear_in_the_row(documents: int) -> None:
    short, long = train_entropy_model(LENGTH, documents), train_entropy_model(2 * LENGTH, documents)
    assert short.num_elements < LENGTH * LENGTH / 8, short.operation
    assert long.num_elements <= 2 * short.num_elements + 1000, long.operation


def test_entropies_of_a_long_document_need_one_chunk() -> None:
    """A document of two rows' bytes streams: logits of one row at a time."""
    model = EntropyModel(EntropyModelConfig(transformer=transformer_config(window=64)))
    largest = largest_of(lambda: document_entropies(model, [b"ab" * LENGTH], row_bytes=LENGTH))
    assert largest.num_elements <= LENGTH * 260, largest.operation


class OuterInBackward(torch.autograd.Function):
    """A sum whose backward pass makes an N x N product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return (x @ x.T) @ x * grads[0]


def test_the_measure_sees_dense_attention_forward_and_backward() -> None:
    """It would notice: scores made in a forward, and those that only a backward makes."""
    x = torch.randn(50, 4, requires_grad=True)
    assert largest_of(lambda: torch.softmax(x @ x.T, -1) @ x).num_elements == 50 * 50
    loss: Tensor = OuterInBackward.apply(x)  # type: ignore[no-untyped-call]
    assert largest_of(loss.backward).num_elements == 50 * 50
