"""A trained model as a directory that transformers' AutoModelForCausalLM and AutoTokenizer load without a network.

It gives our logits with patch lengths passed in, and by its own patcher where the rule is a plain threshold (or bytes)
and no patch of the text exceeds the rule's longest. Other rules are refused unless --lossy-patching is given, and then
the model card says so. Written beside the weights: tokenizer, generation settings and README.md, the model card.
"""

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open

from blt.checkpoint import LanguageModel, language_model_fingerprint, load
from blt.errors import CheckpointError, ConfigError
from blt.interop import to_transformers
from blt.interop.transformers import settings_of
from blt.interop.transformers_config import patching_differences
from jobs.model_card import CardFacts, model_card
from jobs.new_directory import new_directory
from jobs.record import JobRecord, JobResult, read_record
from pipelines.evaluate.evaluation import Evaluation, read_evaluation

POSITIONAL = ("output",)
OPTIONS = {
    "to": "format",
    "model": "model",
    "lossy-patching": "lossy_patching",
    "evaluation": "evaluation",
    "license": "license",
}

CARD_NAME = "README.md"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Keys of `blt export`."""

    model: str
    """Directory of the trained model (`blt train` writes it as OUTPUT/model)."""
    output: str
    """Directory to be made; it must not exist."""
    format: Literal["transformers"] = "transformers"
    """Whose names and files to write."""
    lossy_patching: bool = False
    """Export although transformers' patcher makes other patches than the model's rule."""
    evaluation: str | None = None
    """Directory of an evaluation of this model (the output of `blt eval`), for the card."""
    license: str | None = None
    """Licence of the weights for the card, as the Hub spells it (apache-2.0, other); null says that none is known."""

    def __post_init__(self) -> None:
        if self.license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", self.license):
            raise ConfigError(f"license must be an identifier such as apache-2.0, got {self.license!r}")


def run(config: Config) -> JobResult:
    """Write `config.output` in one piece."""
    started = time.monotonic()
    with new_directory("output", config.output) as directory:
        evaluation = None if config.evaluation is None else _evaluation(config.evaluation, config.model)
        model = _load(Path(config.model))
        differences = patching_differences(settings_of(model))
        if differences and not config.lossy_patching:
            raise ConfigError(
                f"{config.model}: transformers' patcher makes other patches than this model's: {'; '.join(differences)}"
                " (--lossy-patching exports all the same, for use with patch lengths passed in)"
            )
        to_transformers(model, directory, lossy_patching=config.lossy_patching)
        facts = CardFacts(
            title=Path(config.output).resolve().name,
            license=config.license,
            differences=differences,
            training=_training_record(config.model, model),
            evaluation=evaluation,
        )
        (directory / CARD_NAME).write_text(model_card(model, facts), encoding="utf-8")
    figures: dict[str, float | str] = {"format": config.format, "lossy_patching": "yes" if differences else "no"}
    return JobResult(
        seconds=round(time.monotonic() - started, 3),
        path=config.output,
        bpb=None if evaluation is None else round(evaluation.bpb, 4),
        figures=figures,
    )


def _load(directory: Path) -> LanguageModel:
    """The language model in the dtype in which all of its weights are stored; in float32 if they differ."""
    found = {_stored_dtype(file) for file in (directory, directory / "entropy_model") if file.is_dir()}
    dtype = found.pop() if len(found) == 1 else torch.float32
    return load(directory, dtype=dtype)


def _stored_dtype(directory: Path) -> torch.dtype:
    weights = directory / "model.safetensors"
    try:
        with safe_open(weights, framework="pt") as file:
            dtypes = {file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118  # it is no mapping
    except FileNotFoundError as error:
        raise CheckpointError(f"{weights}: no such file; a checkpoint has its weights there") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{weights}: {' '.join(str(error).split())}") from error
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def _evaluation(directory: str, model: str) -> Evaluation:
    found = read_evaluation(directory)
    if found.model != (own := language_model_fingerprint(model)):
        raise ConfigError(
            f'key "evaluation": {directory} is of a model with fingerprint {found.model[:12]}, {model} has {own[:12]}'
        )
    return found


def _training_record(directory: str, model: LanguageModel) -> JobRecord | None:
    """The record of the run whose output the model is, if it still stands there: RUN/job.json beside RUN/model."""
    root = Path(directory).resolve()
    record = read_record(root.parent)
    if record is None or Path(str(record.result.figures.get("model", ""))).name != root.name:
        return None
    return record if str(record.result.figures.get("steps")) == model.provenance.get("step") else None
