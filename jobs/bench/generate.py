"""Measure generation: prefill and the bytes after it, at several lengths of context and for several prompts at once.

The last line of standard output holds the figures. With `--against transformers` its correct route takes turns: the
whole text through entropy model and BLT for every byte, since its cached route gives other bytes; it is told patches of
as many bytes.
"""

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from blt.checkpoint import LanguageModel, load
from blt.decoder import Decoder
from blt.device_peak import gemm_peak_flops
from blt.entropy_model import EntropyModelConfig, document_entropies
from blt.errors import ConfigError
from blt.flops import flops_per_byte
from blt.model import BLTConfig
from blt.patching import PatchRule, patch_lengths
from blt.speculation import SpeculativeDecoder
from blt.vocabulary import BOS, BYTE_OFFSET, VOCABULARY_SIZE, encode
from jobs.bench.circumstances import BenchResult, circumstances, summary
from jobs.bench.corpus import prose
from jobs.bench.subject import MEAN_PATCH_BYTES, drawn, small_blt, small_entropy_model, transformers_model
from jobs.bench.turns import PEAK_SECONDS, peak_memory_bytes, reset_peak_memory

OPTIONS = ("against",)

PATCH_BYTES = round(MEAN_PATCH_BYTES)
"""Of every patch of a model that is drawn."""

TIE = 1e-4
"""Two best logits nearer than this may change places by rounding."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Keys of `blt bench generate`."""

    model: BLTConfig = field(default_factory=small_blt)
    """Shape of the BLT; its weights are drawn."""
    entropy_model: EntropyModelConfig = field(default_factory=small_entropy_model)
    """Shape of the entropy model; its weights are drawn."""
    contexts: tuple[int, ...] = (64, 1024, 8192)
    """Lengths of the prompts, bytes."""
    new_bytes: int = 256
    """Bytes generated after each."""
    batch: int = 16
    """Prompts at once, of unequal length around the first of `contexts`."""
    threads: int = 2
    """Compute threads."""
    repeats: int = 3
    """Measured runs of each."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""
    against: Literal["transformers"] | None = None
    """Peer that takes turns."""
    against_new_bytes: int = 16
    """Bytes that the peer generates."""
    against_context: int = 1024
    """Longest prompt that the peer is given."""
    trained: str | None = None
    """Directory of a trained model, measured instead of drawn weights: how often a patch ends where the decoder expects
    it decides what self-speculation gains."""
    seed: int = 0
    """Of weights and text."""

    def __post_init__(self) -> None:
        if not self.contexts or min(self.contexts) < 1:
            raise ConfigError(f"contexts must name one length of at least 1 or more, got {self.contexts}")
        for name in ("batch", "threads", "repeats", "against_new_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.new_bytes < 2:  # the first byte comes from the prefill
            raise ConfigError(f"new_bytes must be at least 2, got {self.new_bytes}")


@dataclass(frozen=True, kw_only=True)
class Written:
    """What a run gave."""

    prefill_seconds: float
    seconds: float
    """After the prefill."""
    patches: int
    """That began after the first byte, of all prompts."""
    ids: list[list[int]]
    """Of the bytes that were generated, for each prompt."""
    margins: list[list[float]]
    """Between the two best logits of each."""


def run(config: Config) -> BenchResult:
    """Measure every context, then the batch."""
    torch.set_num_threads(config.threads)
    lm = _language_model(config) if config.trained is None else load(config.trained, device=config.device)
    peer = None if config.against is None else transformers_model(lm)
    contexts = {str(length): _context(config, lm, peer, length) for length in config.contexts}
    rates = {length: figures["bytes_per_second"]["median"] for length, figures in contexts.items()}
    first, last = str(min(config.contexts)), str(max(config.contexts))
    figures: dict[str, Any] = {
        "contexts": contexts,
        "cost_of_a_byte_longest_to_shortest": round(rates[first] / rates[last], 3),
        "batch": _batch(config, lm, rates[str(config.contexts[0])]),
    }
    return BenchResult(figures=circumstances(config, config.device) | figures)


def _language_model(config: Config) -> LanguageModel:
    """Drawn weights. Entropies are computed and compared with a threshold that none exceeds, and each patch has as many
    bytes as it may: what drawn weights write has any entropies, others after every length of context."""
    rule = PatchRule(threshold=math.log(VOCABULARY_SIZE) + 1, max_patch_length=PATCH_BYTES)
    return drawn(config.model, config.entropy_model, rule, config.seed, config.device)


def _context(config: Config, lm: LanguageModel, peer: Any, length: int) -> dict[str, Any]:
    (prompt,) = prose(config.seed, 1, length)
    write(lm, [prompt], 2)
    runs, ahead, theirs, forwards = [], [], [], []
    device = next(lm.model.parameters()).device
    peak, memory = gemm_peak_flops(device, torch.float32, PEAK_SECONDS), 0
    compared = peer is not None and length <= config.against_context
    for _ in range(config.repeats):
        reset_peak_memory(device)
        runs.append(write(lm, [prompt], config.new_bytes))
        memory = max(memory, peak_memory_bytes(device))
        if lm.patch_rule.needs_entropies:
            ahead.append(write(lm, [prompt], config.new_bytes, SpeculativeDecoder(lm)))
        forwards.append(_forward_seconds(lm, prompt))
        if compared:
            theirs.append(_peer_bytes_per_second(peer, prompt, config.against_new_bytes))
    rates = [(config.new_bytes - 1) / run.seconds for run in runs]  # the first byte comes from the prefill
    figures: dict[str, Any] = {
        "bytes_per_second": summary(rates),
        "share_of_peak": summary([rate * _flops_per_byte(lm, runs[0], length) / peak for rate in rates]),
        "peak_memory_bytes": memory,
        "prefill_bytes_per_second": summary([length / run.prefill_seconds for run in runs]),
        "prefill_to_forward": summary([f / r.prefill_seconds for f, r in zip(forwards, runs, strict=True)]),
    }
    if ahead:
        agrees, at_tie = _agreement(runs[0].ids[0], ahead[0].ids[0], runs[0].margins[0])
        figures["speculative"] = {
            "bytes_per_second": summary([(config.new_bytes - 1) / run.seconds for run in ahead]),
            "ratio": summary([run.seconds / fast.seconds for run, fast in zip(runs, ahead, strict=True)]),
            "equal": agrees,
            "parts_at_a_tie": at_tie,
        }
    if compared:
        figures[str(config.against)] = {"bytes_per_second": summary(theirs)}
        figures["ratio"] = summary([ours / other for ours, other in zip(rates, theirs, strict=True)])
    return figures


def _batch(config: Config, lm: LanguageModel, single_rate: float) -> dict[str, Any]:
    """Several prompts at once beside each by itself: speed, and the first byte that differs."""
    source, around = random.Random(config.seed), config.contexts[0]
    prompts = [text[: source.randint(max(around // 2, 1), around)] for text in prose(config.seed, config.batch, around)]
    runs = [write(lm, prompts, config.new_bytes) for _ in range(config.repeats)]
    alone = [write(lm, [prompt], config.new_bytes) for prompt in prompts]
    agreeing = [_agreement(run.ids[0], found, margins) for run, found, margins in _pairs(alone, runs[0])]
    rates = [config.batch * (config.new_bytes - 1) / run.seconds for run in runs]
    return {
        "prompts": config.batch,
        "bytes_per_second": summary(rates),
        "ratio_to_one_prompt": summary([rate / single_rate for rate in rates]),
        "equal_to_single_runs": all(same for same, _ in agreeing),
        "prompts_that_part_at_a_tie": sum(tie for _, tie in agreeing),
    }


def _pairs(alone: Sequence[Written], together: Written) -> list[tuple[Written, list[int], list[float]]]:
    return [(run, together.ids[i], run.margins[0]) for i, run in enumerate(alone)]


def _agreement(expected: list[int], found: list[int], margins: list[float]) -> tuple[bool, bool]:
    """Whether two continuations agree, up to the first byte whose two best logits tie; and whether they part there."""
    for one, other, margin in zip(expected, found, margins, strict=True):
        if one != other:
            return margin <= TIE, margin <= TIE
    return True, False


@torch.inference_mode()
def write(
    lm: LanguageModel, prompts: Sequence[bytes], new_bytes: int, ahead: SpeculativeDecoder | None = None
) -> Written:
    """Greedy continuations of exactly `new_bytes` bytes each: EOS and other special ids are never chosen."""
    began = time.perf_counter()
    decoder = Decoder(lm, len(prompts)) if ahead is None else ahead
    ids, margins = _best(decoder.open(prompts))
    prefilled = time.perf_counter()
    found, gaps, patches = [ids], [margins], 0
    for _ in range(new_bytes - 1):
        ids, margins = _best(decoder.step(ids))
        patches += sum(decoder.starts)
        found.append(ids)
        gaps.append(margins)
    return Written(
        prefill_seconds=prefilled - began,
        seconds=time.perf_counter() - prefilled,
        patches=patches,
        ids=[list(row) for row in zip(*found, strict=True)],
        margins=[list(row) for row in zip(*gaps, strict=True)],
    )


def _best(logits_BV: Tensor) -> tuple[list[int], list[float]]:
    values, places = logits_BV[:, BYTE_OFFSET:].topk(2)
    return (places[:, 0] + BYTE_OFFSET).tolist(), (values[:, 0] - values[:, 1]).tolist()


def _flops_per_byte(lm: LanguageModel, run: Written, length: int) -> float:
    """Of a generated byte, entropy model included, with the patches that the run had."""
    mean_patch_bytes = (sum(map(len, run.ids)) - len(run.ids)) / max(run.patches, 1)
    entropies = None if lm.entropy_model is None else lm.entropy_model.config
    return flops_per_byte(lm.config, mean_patch_bytes, length, entropies, counted="done").forward


@torch.inference_mode()
def _forward_seconds(lm: LanguageModel, prompt: bytes) -> float:
    """Entropies, patches and logits of a whole text, as an evaluation computes them."""
    assert lm.entropy_model is not None
    began = time.perf_counter()
    entropies = document_entropies(lm.entropy_model, [prompt])[0]
    ids = torch.cat((torch.tensor([BOS]), encode(prompt)))
    lengths = patch_lengths(ids, entropies.cpu(), lm.patch_rule, include_next=True)
    device = next(lm.model.parameters()).device
    document = torch.zeros_like(ids)[None].to(device)
    lm.model(ids[None].to(device), lengths[None].to(device), document)
    return time.perf_counter() - began


@torch.inference_mode()
def _peer_bytes_per_second(peer: Any, prompt: bytes, new_bytes: int) -> float:
    """Of its whole forward pass for every byte; the first one is not counted, as for ours."""
    ids = torch.cat((torch.tensor([BOS]), encode(prompt)))[None]
    seconds = 0.0
    for number in range(new_bytes + 1):
        patches = torch.full((1, -(-ids.shape[1] // PATCH_BYTES) + 1), PATCH_BYTES)  # the next byte's among them
        patches[0, 0], patches[0, -1] = 1, ids.shape[1] - PATCH_BYTES * (patches.shape[1] - 2)
        began = time.perf_counter()
        peer.model.patcher(ids)
        logits = peer(input_ids=ids, patch_lengths=patches, use_cache=False).logits[:, -1]
        seconds += time.perf_counter() - began if number else 0.0
        ids = torch.cat((ids, torch.tensor([_best(logits)[0]])), 1)
    return new_bytes / seconds
