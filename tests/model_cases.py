"""Small models and batches for tests: configurations, weights with every parameter away from its special value, rows
of packed documents with random patches.

Everything is drawn from a seed, so a hypothesis example or a parametrised case is reproducible from its few numbers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor, nn

from blt.layers import TransformerConfig
from blt.local_encoder import CrossAttentionConfig, HashEmbeddingConfig
from blt.loss import NO_TARGET
from blt.model import BLTConfig


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Model inputs [B,T], [B,P], [B,T] or None, and targets [B,T] (NO_TARGET on padding)."""

    byte_ids: Tensor
    patch_lengths: Tensor
    document_ids: Tensor | None
    targets: Tensor


def transformer_config(**changes: object) -> TransformerConfig:
    """Two heads of width 8, one layer, window 7."""
    base = TransformerConfig(width=16, layers=1, heads=2, ffn_multiple_of=8, window=7)
    return replace(base, **changes)  # type: ignore[arg-type]


def blt_config(
    *,
    encoder: dict[str, object] | None = None,
    latent: dict[str, object] | None = None,
    decoder: dict[str, object] | None = None,
    cross: dict[str, object] | None = None,
    hashes: dict[str, object] | None = None,
) -> BLTConfig:
    """A BLT of width 16 and latent width 24, two slots, two hash sizes; parts changed by key."""
    cross_attention = CrossAttentionConfig(heads=2, slots=2)
    hash_embedding = HashEmbeddingConfig(group_sizes=(2, 3), functions=1, table_size=61)
    return BLTConfig(
        local_encoder=transformer_config(**(encoder or {})),
        latent=transformer_config(**{"width": 24, "layers": 2, "window": None, **(latent or {})}),
        local_decoder=transformer_config(**{"layers": 2, **(decoder or {})}),
        cross_attention=replace(cross_attention, **(cross or {})),  # type: ignore[arg-type]
        hash_embedding=replace(hash_embedding, **(hashes or {})),  # type: ignore[arg-type]
    )


Model = TypeVar("Model", bound=nn.Module)


def randomised(model: Model, seed: int = 0) -> Model:
    """The model with weights drawn from a seed; vectors (norm weights) too, so that none may stand for another."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            value = 1 + 0.3 * draw if parameter.dim() == 1 else draw * parameter.shape[-1] ** -0.5
            parameter.copy_(value)
    return model


def patch_lengths_of(starts: Sequence[Sequence[bool]], trailing_zeros: int = 0) -> Tensor:
    """Patch lengths [B,P] of rows of T + 1 starts."""
    rows = []
    for row in starts:
        places = [i for i, start in enumerate(row) if start] + [len(row)]
        rows.append([after - before for before, after in pairwise(places)])
    longest = max(len(row) for row in rows) + trailing_zeros
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows])


def packed_batch(
    rows: Sequence[Sequence[int]],
    *,
    seed: int = 0,
    start_rate: float = 0.3,
    alphabet: int = 260,
    trailing_zeros: int = 0,
    padding: int = 0,
) -> Batch:
    """Rows of documents of the given numbers of bytes, isolated by document ids, padded to the longest and `padding`.

    Ids are any of the vocabulary's first `alphabet` (the last `alphabet` of it would do as well); a byte opens a patch
    with probability `start_rate`, a document's first two bytes always.
    """
    generator = torch.Generator().manual_seed(seed)
    length = max(1, *(sum(row) for row in rows)) + padding
    byte_ids = torch.zeros(len(rows), length, dtype=torch.int64)
    document_ids = torch.full((len(rows), length), -1)
    targets = torch.full((len(rows), length), NO_TARGET)
    starts = (torch.rand(len(rows), length + 1, generator=generator) < start_rate).tolist()
    number = 0
    for row, documents in enumerate(rows):
        starts[row][:2] = [True, True]
        first = 0
        for num_bytes in documents:
            here = slice(first, first + num_bytes)
            byte_ids[row, here] = torch.randint(0, alphabet, (num_bytes,), generator=generator)
            targets[row, here] = torch.randint(0, 260, (num_bytes,), generator=generator)
            document_ids[row, here] = number
            starts[row][first] = starts[row][first + 1] = True
            first, number = first + num_bytes, number + 1
    return Batch(
        byte_ids=byte_ids,
        patch_lengths=patch_lengths_of(starts, trailing_zeros),
        document_ids=document_ids,
        targets=targets,
    )


def plain_batch(
    num_rows: int,
    length: int,
    *,
    seed: int = 0,
    start_rate: float = 0.3,
    first_id: int = 0,
    alphabet: int = 260,
    eos_rate: float = 0.0,
    trailing_zeros: int = 0,
) -> Batch:
    """Full rows without document ids; ids from first_id on, each an EOS with probability `eos_rate`."""
    generator = torch.Generator().manual_seed(seed)
    byte_ids = torch.randint(first_id, min(first_id + alphabet, 260), (num_rows, length), generator=generator)
    byte_ids[torch.rand(num_rows, length, generator=generator) < eos_rate] = 2
    starts = torch.rand(num_rows, length + 1, generator=generator) < start_rate
    starts[:, :2] = True
    return Batch(
        byte_ids=byte_ids,
        patch_lengths=patch_lengths_of(starts.tolist(), trailing_zeros),
        document_ids=None,
        targets=torch.randint(0, 260, (num_rows, length), generator=generator),
    )


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    """Gradient of the loss by every parameter's name; zeros where the loss does not depend on it."""
    parameters = dict(model.named_parameters())
    grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if grad is None else grad
        for (name, parameter), grad in zip(parameters.items(), grads, strict=True)
    }


def largest_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor], scale: Callable[[Tensor], Tensor]) -> float:
    """Largest difference of two sets of tensors of the same names, each over the scale of the second's tensor."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max() / scale(theirs[name])) for name in ours)
