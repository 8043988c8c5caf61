"""How the next byte is chosen: logits in, one id for each row out.

Shapes: B rows, V vocabulary. Only bytes and EOS can be chosen; the other special ids are masked.
"""

from collections.abc import Sequence
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


def next_ids(logits_BV: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> list[int]:
    """The ids chosen from logits of the next bytes; uses one uniform number of each row's generator unless greedy."""
    specials = torch.tensor([special for special in range(BYTE_OFFSET) if special != EOS])
    allowed_BV = logits_BV.double().cpu().index_fill(1, specials, -torch.inf)
    if sampling.temperature == 0:
        greedy: list[int] = allowed_BV.argmax(1).tolist()
        return greedy
    # Differences first: dividing large logits by a small temperature would overflow.
    scaled_BV = (allowed_BV - allowed_BV.amax(1, keepdim=True)) / sampling.temperature
    probability_BV, id_BV = torch.softmax(scaled_BV, 1).sort(dim=1, descending=True, stable=True)
    kept = min(sampling.top_k or VOCABULARY_SIZE, VOCABULARY_SIZE)
    below_BV = probability_BV[:, :kept].cumsum(1)
    total_B1 = below_BV[:, -1:]
    if sampling.top_p is not None:
        # The number of entries that do not reach top_p together, and the one that does.
        short_B1 = (below_BV < sampling.top_p * total_B1).sum(1, keepdim=True)
        total_B1 = below_BV.gather(1, short_B1.clamp(max=kept - 1))
    draws = [torch.rand(1, dtype=torch.float64, generator=generator) for generator in generators]
    place_B1 = (below_BV <= torch.stack(draws) * total_B1).sum(1, keepdim=True)
    last_B1 = (below_BV < total_B1).sum(1, keepdim=True)
    drawn: list[int] = id_BV.gather(1, torch.minimum(place_B1, last_B1))[:, 0].tolist()
    return drawn
