"""One optimisation step: micro-batches in, summed loss and updated weights out; the same for BLT and entropy model.

The loss of a step is the sum of all ranks' nats over the sum of their targets: gradients are summed over micro-batches
and ranks first and divided once, so that the loss curve does not depend on how the batch was cut.
Shapes: B rows, T input bytes, P patches, V vocabulary.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from blt.loss import NO_TARGET, summed_cross_entropy
from blt.model import BLT
from blt.parallel import FlatGradients
from blt.vocabulary import EOS


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A micro-batch on the host, in small integers; targets are -1 where there is none."""

    byte_ids_BT: Tensor
    targets_BT: Tensor
    document_ids_BT: Tensor
    patch_lengths_BP: Tensor | None = None
    """None for a model that has no patches."""

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
class Tally:
    """What a set of batches cost: nats summed over targets (bytes and EOS), and how many there were."""

    nats: float
    targets: int
    bytes: int
    """Targets that are document bytes."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """A step over all ranks."""

    tally: Tally
    grad_norm: float
    """Norm of the gradient of the mean loss, before clipping."""


def tally_batch(model: nn.Module, batch: Batch, autocast: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Summed nats (differentiable), number of targets and number of byte targets of a batch on the model's device."""
    with torch.autocast(batch.byte_ids_BT.device.type, autocast, enabled=autocast is not None):
        if isinstance(model, BLT):
            assert batch.patch_lengths_BP is not None
            logits_BTV = model(batch.byte_ids_BT, batch.patch_lengths_BP, batch.document_ids_BT)
        else:
            logits_BTV = model(batch.byte_ids_BT, batch.document_ids_BT)
    is_target = batch.targets_BT != NO_TARGET
    return (
        summed_cross_entropy(logits_BTV, batch.targets_BT),
        is_target.sum(),
        (is_target & (batch.targets_BT != EOS)).sum(),
    )


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    gradients: FlatGradients,
    batches: Iterable[Batch],
    *,
    clip_norm: float | None,
    autocast: torch.dtype | None = None,
) -> StepResult:
    """Run the micro-batches, sum gradients and counts over the ranks, clip by the global norm, and step.

    Raises FloatingPointError, leaving the weights alone, if the loss or a gradient is not finite.
    """
    gradients.zero()
    device = gradients.device
    for batch in batches:
        nats, targets, num_bytes = tally_batch(model, batch.to(device), autocast)
        nats.backward()
        gradients.count(nats.detach(), targets, num_bytes)
    nats_sum, targets_sum, bytes_sum = gradients.sum_over_ranks()
    tally = Tally(nats=nats_sum, targets=round(targets_sum), bytes=round(bytes_sum))
    grad_norm = gradients.divide_and_clip(max(tally.targets, 1), clip_norm)
    if not (torch.isfinite(torch.tensor(nats_sum)) and torch.isfinite(torch.tensor(grad_norm))):
        raise FloatingPointError(f"the loss ({nats_sum} nats) or its gradient (norm {grad_norm}) is not finite")
    optimizer.step()
    return StepResult(tally=tally, grad_norm=grad_norm)
