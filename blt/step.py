"""One optimisation step: micro-batches in, summed loss and updated weights out; the same for BLT and entropy model.

`accumulate` -> counts and gradients are summed over the workers -> `update`. The loss of a step is the sum of all
ranks' nats over the sum of their targets: gradients are summed over micro-batches and ranks first and divided once, so
that the loss curve does not depend on how the batch was cut.
Shapes: B rows, T input bytes, P patches, V vocabulary.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from blt.loss import NO_TARGET, summed_cross_entropy
from blt.parallel import Gradients, sum_over_ranks
from blt.vocabulary import EOS


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A micro-batch on the host, in small integers; targets are -1 where there is none."""

    byte_ids_BT: Tensor
    targets_BT: Tensor
    document_ids_BT: Tensor
    patch_lengths_BP: Tensor | None = None
    """None for a model that has no patches."""

    def pinned(self) -> "Batch":
        """The batch in pages that a CUDA device copies from on its own."""
        lengths = self.patch_lengths_BP
        return Batch(
            byte_ids_BT=self.byte_ids_BT.contiguous().pin_memory(),
            targets_BT=self.targets_BT.contiguous().pin_memory(),
            document_ids_BT=self.document_ids_BT.contiguous().pin_memory(),
            patch_lengths_BP=None if lengths is None else lengths.pin_memory(),
        )

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device, as int64."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True).long()

        return Batch(
            byte_ids_BT=moved(self.byte_ids_BT),
            targets_BT=moved(self.targets_BT),
            document_ids_BT=moved(self.document_ids_BT),
            patch_lengths_BP=None if self.patch_lengths_BP is None else moved(self.patch_lengths_BP),
        )


@dataclass(frozen=True, kw_only=True)
class StepTotals:
    """What a round over all workers came to."""

    nats: float
    """Summed over targets (bytes and EOS)."""
    targets: int
    bytes: int
    """Targets that are document bytes."""
    patches: int
    """Those that hold a target, documents' and fragments' first ones not counted."""
    sequence_hash: int
    """Sum modulo 2**64 of the ids of the sequences."""
    save_requested: bool
    """Whether any worker asked for a checkpoint."""


class StepCounts:
    """A worker's counts of a round: one float64 vector, to be summed over the workers beside the gradients.

    float32 would lose whole bytes above 2 ** 24. A 64-bit hash travels as two halves, whose sums stay exact.
    """

    _HALF = 1 << 32

    def __init__(self, device: torch.device) -> None:
        self.vector = torch.zeros(7, device=device, dtype=torch.float64)

    def zero(self) -> None:
        self.vector.zero_()

    def add(self, nats: Tensor, targets: Tensor, num_bytes: Tensor) -> None:
        """Add a batch's summed nats, targets and byte targets, as `tally_batch` gives them."""
        self.vector[:3] += torch.stack((nats.detach().double(), targets.double(), num_bytes.double()))

    def add_sequences(self, sequence_hash: int, patches: int) -> None:
        """Add the sequences that were read."""
        high, low = divmod(sequence_hash, self._HALF)
        self.vector[3:6] += torch.tensor([low, high, patches], dtype=torch.float64, device=self.vector.device)

    def request_save(self, requested: bool) -> None:
        self.vector[6] += float(requested)

    def totals(self) -> StepTotals:
        """The counts as they stand, summed or not."""
        nats, targets, num_bytes, low, high, patches, requests = self.vector.tolist()
        return StepTotals(
            nats=nats,
            targets=round(targets),
            bytes=round(num_bytes),
            patches=round(patches),
            sequence_hash=(round(high) * self._HALF + round(low)) % self._HALF**2,
            save_requested=requests > 0,
        )


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """A step over all ranks."""

    tally: StepTotals
    grad_norm: float
    """Norm of the gradient of the mean loss, before clipping."""


def tally_batch(model: nn.Module, batch: Batch, autocast: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Summed nats (differentiable), number of targets and number of byte targets of a batch on the model's device."""
    with torch.autocast(batch.byte_ids_BT.device.type, autocast, enabled=autocast is not None):
        if batch.patch_lengths_BP is not None:
            logits_BTV = model(batch.byte_ids_BT, batch.patch_lengths_BP, batch.document_ids_BT)
        else:
            logits_BTV = model(batch.byte_ids_BT, batch.document_ids_BT)
    is_target = batch.targets_BT != NO_TARGET
    return (
        summed_cross_entropy(logits_BTV, batch.targets_BT),
        is_target.sum(),
        (is_target & (batch.targets_BT != EOS)).sum(),
    )


def accumulate(
    model: nn.Module, counts: StepCounts, batches: Iterable[Batch], autocast: torch.dtype | None = None
) -> None:
    """Forward and backward of this worker's micro-batches: gradients and counts add up, nothing is divided yet."""
    for batch in batches:
        nats, targets, num_bytes = tally_batch(model, batch.to(counts.vector.device), autocast)
        nats.backward()
        counts.add(nats, targets, num_bytes)


def update(
    optimizer: torch.optim.Optimizer, gradients: Gradients, totals: StepTotals, *, clip_norm: float | None
) -> float:
    """Divide summed gradients by the global number of targets, clip them, and step; their norm before clipping.

    Raises FloatingPointError, leaving the weights alone, if the loss or a gradient is not finite.
    """
    grad_norm = gradients.divide_and_clip(max(totals.targets, 1), clip_norm)
    if not (math.isfinite(totals.nats) and math.isfinite(grad_norm)):
        raise FloatingPointError(f"the loss ({totals.nats} nats) or its gradient (norm {grad_norm}) is not finite")
    optimizer.step()
    return grad_norm


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    gradients: Gradients,
    batches: Iterable[Batch],
    *,
    clip_norm: float | None,
    autocast: torch.dtype | None = None,
) -> StepResult:
    """A whole step over the ranks of the default process group, or of this process alone without one."""
    gradients.zero()
    counts = StepCounts(next(model.parameters()).device)
    accumulate(model, counts, batches, autocast)
    sum_over_ranks(counts.vector)
    gradients.sum_over_ranks()
    totals = counts.totals()
    return StepResult(tally=totals, grad_norm=update(optimizer, gradients, totals, clip_norm=clip_norm))
