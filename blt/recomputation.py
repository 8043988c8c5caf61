"""What a transformer block keeps for its backward pass, and how it is compiled: blocks in, the same blocks out.

Both replace the `forward` of a block alone, so names of modules and weights stay as they are.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from blt.layers import Block

logger = logging.getLogger(__name__)

Recomputation = Literal["none", "selective", "full"]
"""What the backward pass computes again: nothing; all but the outputs of matrix products; whole blocks."""


def prepare_blocks(
    model: nn.Module, recomputation: Recomputation, compile: bool, device: torch.device | str = "cpu"
) -> None:
    """Compile the blocks of a model that will run on `device` and have them keep less, as asked; before sharding."""
    if compile:
        compile_blocks(model, device)
    recompute_blocks(model, recomputation)


def recompute_blocks(model: nn.Module, kind: Recomputation) -> None:
    """Have the blocks of a model keep less for the backward pass."""
    if kind == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # no block draws numbers
    if kind == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _keep_products)
    for block in blocks_of(model):
        block.forward = functools.partial(checkpoint, block.forward, **options)  # type: ignore[method-assign]


def compile_blocks(model: nn.Module, device: torch.device | str = "cpu") -> bool:
    """Compile the blocks of a model, all but their attention; without a compiler that works say so and leave
    them.

    Attention in bands is a loop over blocks of queries whose borders differ from batch to batch: it would be compiled
    anew each time. FlexAttention, which CUDA runs instead, is compiled by itself (`blt.flex_attention`), for any
    borders and once for all layers of a shape; disabling what is around it leaves that as it is. Returns whether the
    blocks are compiled.
    """
    try:
        compiled = torch.compile(_probe)
        compiled(torch.ones(8, device=device))
    except Exception as error:  # whatever it is that the compiler lacks: the run goes on without it
        logger.warning("torch.compile does not work here, going on without it: %s", _first_line(error))
        return False
    for block in blocks_of(model):
        block.attention.forward = torch.compiler.disable(block.attention.forward)  # type: ignore[method-assign]
        block.forward = torch.compile(block.forward, dynamic=True)  # type: ignore[method-assign]
    return True


def blocks_of(model: nn.Module) -> list[Block]:
    """All transformer blocks, in order."""
    return [module for module in model.modules() if isinstance(module, Block)]


def _keep_products(context: Any, operation: Callable[..., Any], *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep the outputs of projections that run as operations of their own.

    Either form of attention is computed again: the loop's products have other names, a compiled FlexAttention is no
    operation at all, and its backward pass needs the sums of its forward pass. The same goes for what `compile_blocks`
    compiles: of a compiled block only the two projections of its attention are kept.
    """
    keep = operation in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def _probe(x: torch.Tensor) -> torch.Tensor:
    return torch.sin(x) + x


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
