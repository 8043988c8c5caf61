"""Measure the entropy pass: next-byte entropies of documents by the streaming model, as a share of the machine's peak.

The last line of standard output holds the figures. With `--against transformers` its patcher takes turns on the same
weights and documents, one document at a time as it has to (it sees no borders between those of a row).
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from blt.entropy_model import EntropyModel, EntropyModelConfig, document_entropies, next_byte_entropy
from blt.errors import ConfigError
from blt.flops import entropy_flops_per_byte
from blt.patching import PatchRule
from blt.recomputation import compile_blocks
from blt.vocabulary import encode
from jobs.bench.circumstances import BenchResult, circumstances
from jobs.bench.corpus import prose
from jobs.bench.subject import drawn, small_blt, small_entropy_model, transformers_model
from jobs.bench.turns import ratios, speed_figures, take_turns

OPTIONS = ("against",)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Keys of `blt bench entropy`."""

    model: EntropyModelConfig = field(default_factory=small_entropy_model)
    """Shape of the entropy model; its weights are drawn."""
    shortest_bytes: int = 8192
    """Shortest document."""
    longest_bytes: int = 8192
    """Longest document; lengths between the two are equally likely."""
    bytes: int = 65536
    """Text in all, or a little more."""
    row_bytes: int = 8192
    """Bytes of a row, in which several documents may stand."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of weights and results; entropies are float32."""
    compile: bool = False
    """torch.compile each transformer block."""
    threads: int = 2
    """Compute threads."""
    repeats: int = 3
    """Measured runs."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""
    against: Literal["transformers"] | None = None
    """Peer that takes turns."""
    seed: int = 0
    """Of weights and text."""

    def __post_init__(self) -> None:
        for name in ("shortest_bytes", "bytes", "row_bytes", "threads", "repeats"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.longest_bytes < self.shortest_bytes:
            raise ConfigError(f"longest_bytes {self.longest_bytes} is below shortest_bytes {self.shortest_bytes}")


def run(config: Config) -> BenchResult:
    """Measure, in turns."""
    torch.set_num_threads(config.threads)
    device = torch.device(config.device)
    dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
    lm = drawn(small_blt(), config.model, PatchRule(), config.seed, config.device)
    assert lm.entropy_model is not None
    model, documents = lm.entropy_model.to(dtype), _documents(config)
    if config.compile:
        compile_blocks(model, device)
    subjects: dict[str, Callable[[], object]] = {
        "ours": lambda: document_entropies(model, documents, row_bytes=config.row_bytes)
    }
    if config.against is not None:
        patcher = transformers_model(lm).model.patcher.to(device, dtype)
        subjects[config.against] = lambda: _theirs(patcher, documents, device)
    turns = take_turns(subjects, config.repeats, device, dtype)
    num_bytes = sum(map(len, documents))
    flops = sum(len(text) * entropy_flops_per_byte(config.model, len(text), "done") for text in documents) / num_bytes
    figures: dict[str, Any] = {
        "documents": len(documents),
        "measured_bytes": num_bytes,
        "flops_per_byte": round(flops),
        "gemm_flops": round(max(turn.gemm_flops for turn in turns["ours"])),
    }
    figures |= speed_figures(turns["ours"], num_bytes, flops)
    if config.against is not None:
        figures[config.against] = speed_figures(turns[config.against], num_bytes, flops)
        figures["ratio"] = ratios(turns["ours"], turns[config.against])
        figures["largest_difference_nats"] = _difference(model, patcher, encode(documents[0])[None].to(device))
    return BenchResult(figures=circumstances(config, config.device) | figures)


def _documents(config: Config) -> list[bytes]:
    """Words of lengths drawn between the shortest and the longest."""
    source = random.Random(config.seed)
    lengths: list[int] = []
    while sum(lengths) < config.bytes:
        lengths.append(source.randint(config.shortest_bytes, config.longest_bytes))
    (text,) = prose(config.seed, 1, sum(lengths))
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    return [text[end - length : end] for end, length in zip(ends, lengths, strict=True)]


@torch.inference_mode()
def _theirs(patcher: Any, documents: Sequence[bytes], device: torch.device) -> list[Tensor]:
    return [patcher(encode(text)[None].to(device))[0][0] for text in documents]


@torch.inference_mode()
def _difference(model: EntropyModel, patcher: Any, ids_BT: Tensor) -> float:
    """Between the entropies of both on the same ids."""
    return float((next_byte_entropy(model(ids_BT)) - patcher(ids_BT)[0]).abs().max())
