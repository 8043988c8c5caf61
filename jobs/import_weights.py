"""Published weights into a checkpoint of ours, which blt.load, eval, generate and further training read.

From the reference's directories (params.json or config.json, with consolidated.pth or safetensors) or from those of
transformers. Every tensor is placed, or the import fails and names those that are missing, unexpected or of another
shape. No code in a file is run: of pickles only tensors are read. A directory of an entropy model alone becomes one.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from blt.checkpoint import LanguageModel, save_entropy_model, save_language_model
from blt.entropy_model import EntropyModel
from blt.errors import ConfigError
from blt.interop import from_reference_directory, from_transformers
from blt.patching import PatchRule
from jobs.new_directory import new_directory
from jobs.record import JobResult

POSITIONAL = ("source", "output")
OPTIONS = {"from": "source_format", "entropy-model": "entropy_model", "dtype": "dtype"}

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Keys of `blt import`."""

    source_format: Literal["reference", "transformers"]
    """Whose names and files they are."""
    source: str
    """Directory with the weights."""
    output: str
    """Directory to be made; it must not exist."""
    entropy_model: str | None = None
    """Directory of the entropy model, in the reference's layout; null looks for SOURCE/entropy_model and then among the
    weights. transformers has it among the weights."""
    patch_rule: PatchRule | None = None
    """How the model's text is cut into patches; null takes what the source says."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights that are written."""
    ignore: tuple[str, ...] = ()
    """Exact names of arguments and tensors of the reference to pass over, where one is known to change no number."""

    def __post_init__(self) -> None:
        if self.source_format == "transformers" and (self.entropy_model is not None or self.ignore):
            raise ConfigError("entropy_model and ignore are for source_format=reference only")


def run(config: Config) -> JobResult:
    """Read, check and place all weights, then write `config.output` in one piece."""
    started = time.monotonic()
    with new_directory("output", config.output) as directory:
        found = _read(config)
        provenance = {"imported_from": config.source_format, "source": Path(config.source).resolve().name}
        if isinstance(found, EntropyModel):
            save_entropy_model(found, directory, provenance)
        else:
            rule = config.patch_rule or found.patch_rule
            whole = replace(found, patch_rule=rule, provenance=found.provenance | provenance)
            save_language_model(whole, directory)
    return replace(_result(found), seconds=round(time.monotonic() - started, 3), path=config.output)


def _read(config: Config) -> LanguageModel | EntropyModel:
    dtype = _DTYPES[config.dtype]
    if config.source_format == "transformers":
        return from_transformers(config.source, dtype=dtype)
    return from_reference_directory(
        config.source,
        entropy_model=config.entropy_model,
        patch_rule=config.patch_rule,
        dtype=dtype,
        ignore=config.ignore,
    )


def _result(found: LanguageModel | EntropyModel) -> JobResult:
    models = [found] if isinstance(found, EntropyModel) else [found.model, found.entropy_model]
    counts = [sum(p.numel() for p in model.parameters()) for model in models if model is not None]
    figures: dict[str, float | str] = {"parameters": counts[0]}
    if len(counts) > 1:
        figures["entropy_model_parameters"] = counts[1]
    return JobResult(figures={"kind": "entropy_model" if found is models[0] else "blt", **figures})
