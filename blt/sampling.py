"""How the next byte is chosen: logits in, one id out.

Shapes: V vocabulary. Only bytes and EOS can be chosen; the other special ids are masked.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from blt.errors import ConfigError
from blt.vocabulary import BYTE_OFFSET, EOS, VOCABULARY_SIZE


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Greedy at temperature 0, else a draw from the softmax, cut by `top_k` first and by `top_p` of what is left."""

    temperature: float = 0.0
    """Logits are divided by this; 0 takes the most likely byte, and the other fields are not used."""
    top_k: int | None = None
    """Only the k most likely are candidates; None = all."""
    top_p: float | None = None
    """Only the fewest most likely that hold this probability are candidates, always at least one; None = all."""
    seed: int | None = None
    """Seed of the draws; None takes one from the operating system."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature must be at least 0 and finite, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be above 0 and at most 1, got {self.top_p}")

    def generator(self) -> torch.Generator:
        """A fresh source of draws on the CPU, so that a seed gives the same draws on every device."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


def next_id(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """The id chosen from logits of the next byte; uses one uniform number of `generator` unless greedy."""
    allowed_V = logits_V.double().cpu()
    specials = [special for special in range(BYTE_OFFSET) if special != EOS]
    allowed_V[specials] = -torch.inf
    if sampling.temperature == 0:
        return int(allowed_V.argmax())
    # Differences first: dividing large logits by a small temperature would overflow.
    scaled_V = (allowed_V - allowed_V.max()) / sampling.temperature
    probability_V, id_V = torch.softmax(scaled_V, 0).sort(descending=True, stable=True)
    kept = min(sampling.top_k or VOCABULARY_SIZE, VOCABULARY_SIZE)
    below_V = probability_V[:kept].cumsum(0)
    if sampling.top_p is not None:
        # The number of entries that do not reach top_p together, and the one that does.
        short = int((below_V < sampling.top_p * below_V[-1]).sum())
        below_V = below_V[: short + 1]
    draw = torch.rand(1, dtype=torch.float64, generator=generator) * below_V[-1]
    return int(id_V[int(torch.searchsorted(below_V, draw, right=True).clamp(max=len(below_V) - 1))])
