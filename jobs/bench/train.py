"""Measure a training step without its update: forward and backward pass of a BLT, as a share of the machine's peak.

The last line of standard output holds the figures for each shape of rows. With `--against transformers` its model takes
turns on the same weights, bytes and patch lengths; shapes over `against_bytes` a row are left out for it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

from blt.errors import ConfigError
from blt.flops import flops_per_byte
from blt.loss import NO_TARGET, summed_cross_entropy
from blt.model import BLTConfig
from blt.patching import PatchRule
from blt.recomputation import Recomputation, prepare_blocks
from blt.step import Batch, tally_batch
from blt.vocabulary import BYTE_OFFSET, encode
from jobs.bench.circumstances import BenchResult, circumstances
from jobs.bench.corpus import prose
from jobs.bench.subject import (
    MEAN_PATCH_BYTES,
    RowShape,
    drawn,
    drawn_patch_lengths,
    small_blt,
    small_entropy_model,
    transformers_model,
)
from jobs.bench.turns import ratios, speed_figures, take_turns

OPTIONS = ("against",)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Keys of `blt bench train`."""

    model: BLTConfig = field(default_factory=small_blt)
    """Shape of the BLT; its weights are drawn."""
    shapes: tuple[RowShape, ...] = (RowShape(bytes=512, rows=4), RowShape(bytes=2048, rows=4), RowShape(bytes=8192))
    """Rows of the batches that are measured, a document each."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the matrix products."""
    activation_checkpointing: Recomputation = "none"
    """What the backward pass computes again."""
    compile: bool = False
    """torch.compile each transformer block."""
    threads: int = 2
    """Compute threads."""
    repeats: int = 3
    """Measured runs of each shape."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""
    against: Literal["transformers"] | None = None
    """Peer that takes turns."""
    against_bytes: int = 8192
    """Longest rows that the peer is given."""
    seed: int = 0
    """Of weights, text and patch lengths."""

    def __post_init__(self) -> None:
        if not self.shapes:
            raise ConfigError("shapes must name one shape of rows or more")
        for name in ("threads", "repeats"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")


def run(config: Config) -> BenchResult:
    """Measure every shape, in turns."""
    torch.set_num_threads(config.threads)
    device = torch.device(config.device)
    lm = drawn(config.model, small_entropy_model(), PatchRule(), config.seed, config.device)
    peer = transformers_model(lm).to(device) if config.against is not None else None
    model = lm.model.train()
    prepare_blocks(model, config.activation_checkpointing, config.compile)
    measured = {f"{shape.bytes}x{shape.rows}": _measure(config, shape, model, peer) for shape in config.shapes}
    about = circumstances(config, config.device)
    return BenchResult(figures=about | {"parameters": sum(p.numel() for p in model.parameters()), "shapes": measured})


def _measure(config: Config, shape: RowShape, model: nn.Module, peer: Any) -> dict[str, Any]:
    device = torch.device(config.device)
    autocast = torch.bfloat16 if config.precision == "bfloat16" else None
    batch = _batch(shape, config.seed).to(device)
    subjects: dict[str, Callable[[], object]] = {"ours": lambda: _ours(model, batch, autocast)}
    is_compared = peer is not None and shape.bytes <= config.against_bytes
    if is_compared:
        subjects["theirs"] = lambda: _theirs(peer, batch)
    turns = take_turns(subjects, config.repeats, device, autocast or torch.float32)
    num_bytes = shape.bytes * shape.rows
    flops = flops_per_byte(config.model, MEAN_PATCH_BYTES, shape.bytes, counted="done").training
    figures = {"flops_per_byte": round(flops)} | speed_figures(turns["ours"], num_bytes, flops)
    if is_compared:
        figures[str(config.against)] = speed_figures(turns["theirs"], num_bytes, flops)
        figures["ratio"] = ratios(turns["ours"], turns["theirs"])
        figures["loss_difference"] = abs(_ours(model, batch, autocast) - _theirs(peer, batch))
    return figures


def _batch(shape: RowShape, seed: int) -> Batch:
    """Rows of words, each a document without its borders, in which every byte but the first is a target."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([encode(text) for text in prose(seed, shape.rows, shape.bytes)])
    assert int(ids.min()) >= BYTE_OFFSET
    return Batch(
        byte_ids_BT=ids,
        targets_BT=F.pad(ids[:, 1:], (0, 1), value=NO_TARGET),
        document_ids_BT=torch.zeros_like(ids),
        patch_lengths_BP=drawn_patch_lengths(shape, generator),
    )


def _ours(model: nn.Module, batch: Batch, autocast: torch.dtype | None) -> float:
    """Forward and backward pass; the mean loss."""
    model.zero_grad(set_to_none=False)
    nats, targets, _ = tally_batch(model, batch, autocast)
    nats.backward()
    return float(nats.detach()) / float(targets)


def _theirs(model: Any, batch: Batch) -> float:
    """The same by transformers' model."""
    model.zero_grad(set_to_none=False)
    output = model(input_ids=batch.byte_ids_BT, patch_lengths=batch.patch_lengths_BP, use_cache=False)
    nats = summed_cross_entropy(output.logits, batch.targets_BT)
    nats.backward()
    return float(nats.detach()) / float((batch.targets_BT != NO_TARGET).sum())
