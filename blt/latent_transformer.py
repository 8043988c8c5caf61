"""Latent (global) transformer: patch slots in, patch vectors out; the part that holds most of the parameters.

In: patch slots [B,P,k*D]. Out: [B,P,G]. A patch sees the patches of its own document up to itself. No final norm.
Shapes: B rows, P patches, k slots, D local width, G latent width. Source: arXiv 2412.09871.
"""

from torch import Tensor, nn

from blt.layers import Block, Memory, TransformerConfig, init_blocks, init_linear


class LatentTransformer(nn.Module):
    """A projection of the slots where widths differ, then blocks over patches."""

    def __init__(self, shape: TransformerConfig, input_width: int) -> None:
        super().__init__()
        self.shape = shape
        self.projection = nn.Linear(input_width, shape.width, bias=False) if input_width != shape.width else None
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))

    def reset_parameters(self) -> None:
        """Initial weights as the published implementation draws them."""
        if self.projection is not None:
            init_linear(self.projection.weight)
        init_blocks(self.blocks, self.shape)

    def forward(self, slots_BPS: Tensor, memory: Memory) -> Tensor:
        """Patch vectors [B,P,G]."""
        x = slots_BPS if self.projection is None else self.projection(slots_BPS)
        for layer, block in enumerate(self.blocks):
            x = block(x, memory, layer)
        return x
