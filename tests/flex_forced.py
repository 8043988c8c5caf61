"""FlexAttention where the tests need it: on CPU, in eager mode, with gradients, which torch allows on CUDA alone."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
import torch._dynamo
import torch.nn.attention.flex_attention as torch_flex
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from blt import layers
from blt.flex_attention import Turns, rotated_attention


@contextmanager
def gradients_on_cpu() -> Iterator[None]:
    """torch refuses them because its compiled CPU kernel has none; the operator in eager mode has them."""
    with patch.object(torch_flex, "_validate_device", lambda query, key, value: None):
        yield


@contextmanager
def flex_forced() -> Iterator[list[BlockMask]]:
    """Self-attention through FlexAttention in eager mode wherever a model asks; the masks of the calls, in order."""
    masks: list[BlockMask] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, turns: Turns, mask: BlockMask) -> Tensor:
        masks.append(mask)
        return rotated_attention(q, k, v, turns, mask)

    with ExitStack() as stack:
        stack.enter_context(gradients_on_cpu())
        # The operator takes its scale as a number. One that has changed is made a tensor by the compiled call from then
        # on, an operation that selective recomputation would then see where the forward pass had none.
        stack.enter_context(torch._dynamo.config.patch(specialize_float=True))
        stack.enter_context(patch.object(layers, "flex_fits", lambda q: True))
        stack.enter_context(patch.object(layers, "flex_causal_attention", attend))
        yield masks
