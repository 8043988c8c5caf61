"""The model card of an exported model: README.md with YAML front matter, filled from the run that made the model.

In: the language model, what transformers' patcher does not follow, and, where they are known, the record of the
training run and an evaluation. Out: Markdown. Nothing is said that is not recorded, and what is not is said.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml

from blt.checkpoint import LanguageModel
from blt.config_json import to_json
from jobs.record import JobRecord
from jobs.rule_text import rule_text
from pipelines.evaluate.evaluation import Evaluation
from pipelines.train.told_sources import read_sources

NOT_RECORDED = "not recorded"

_CONFIGURATION_OF = {
    True: "The model, and the run that made it, without paths.",
    False: "The model alone: the settings of the run that made it are not at hand.",
}
"""By whether there is the record of a run."""

_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a card tells besides the model."""

    title: str
    license: str | None
    """Identifier of the weights' licence as the Hub spells it; None: not known."""
    differences: Sequence[str]
    """What of the patching transformers does not follow."""
    training: JobRecord | None
    evaluation: Evaluation | None


def model_card(model: LanguageModel, facts: CardFacts) -> str:
    """The text of README.md."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # Markdown
        keep_trailing_newline=True,
    )
    told = _told(model, facts.training)
    return environment.get_template("card.md.jinja").render(
        front_matter=_front_matter(facts.license),
        title=facts.title,
        parameters=_count(model.model),
        entropy_parameters=0 if model.entropy_model is None else _count(model.entropy_model),
        rule=rule_text(model.patch_rule, model.reset_on_newline),
        entropy_model=_entropy_model(model),
        differences=facts.differences,
        max_patch_length=model.patch_rule.max_patch_length,
        data=_quoted(told.get("data")),
        sources=_sources(told.get("sources")),
        imported=_imported(told),
        trained="step" in told,
        facts=_training(told),
        evaluation=facts.evaluation,
        licence=_licence(facts.license),
        configuration_of=_CONFIGURATION_OF[facts.training is not None],
        configuration=_configuration(model, facts.training),
    )


def _front_matter(licence: str | None) -> str:
    values = {
        "license": licence or "unknown",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["blt", "byte-level"],
    }
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _licence(licence: str | None) -> str:
    if licence is None:
        return "None was named for these weights when they were exported; ask whoever trained them."
    return f"`{licence}`, for the weights."


def _told(model: LanguageModel, record: JobRecord | None) -> dict[str, str]:
    """What the checkpoint carries of its run, or else the run's record."""
    told = dict[str, str]()
    if record is not None and record.result.bytes is not None:
        told["bytes"] = str(record.result.bytes)
    if record is not None and record.result.bpb is not None:
        told["valid_bpb"] = str(record.result.bpb)
    return told | model.provenance


def _entropy_model(model: LanguageModel) -> str:
    if not model.patch_rule.needs_entropies:
        return "none, the rule needs no entropies"
    where = "" if model.entropy_model is not None else ", not among the weights"
    return f"fingerprint {_quoted(model.entropy_fingerprint) or NOT_RECORDED}{where}"


def _sources(text: str | None) -> list[dict[str, str | int]]:
    """Rows of the table of sources."""
    return [
        {
            "name": _cell(source.name),
            "documents": source.documents,
            "bytes": source.bytes,
            "license": NOT_RECORDED if source.license is None else _cell(source.license),
        }
        for source in ([] if text is None else read_sources(text))
    ]


def _imported(told: Mapping[str, str]) -> str | None:
    if "imported_from" not in told:
        return None
    return f"format: {_cell(told['imported_from'])}, directory: {_quoted(told.get('source')) or NOT_RECORDED}"


def _training(told: Mapping[str, str]) -> dict[str, str]:
    """Rows of the table of the run; empty for a model without one."""
    if "step" not in told:
        return {}
    rows = {
        "updates": _number(told["step"]),
        "bytes trained on, repeats counted": _number(told.get("bytes")),
        "bits per byte of the held-out split, in training's sequences": told.get("valid_bpb", NOT_RECORDED),
        "run": _quoted(told.get("run")) or NOT_RECORDED,
    }
    for key, name in (("init_from", "started from the model"), ("init_latent_from", "latent transformer started from")):
        if key in told:
            rows[name] = f"{_quoted(told[key])}"
    return rows


def _number(text: str | None) -> str:
    if text is None:
        return NOT_RECORDED
    return f"{int(text):,}" if text.isdecimal() else _cell(text)


def _quoted(text: str | None) -> str | None:
    return None if text is None else f"`{_cell(text)}`"


def _cell(text: str) -> str:
    """Text that stays in its cell of a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("`", "'")


def _configuration(model: LanguageModel, record: JobRecord | None) -> str:
    """YAML of the model's shape, and of the run's settings where they are recorded, without its paths."""
    values: dict[str, Any] = {"model": to_json(model.config), "patch_rule": to_json(model.patch_rule)}
    if record is not None:
        paths = ("model", "data", "documents", "entropy_model", "output", "init_from", "init_latent_from")
        values["training"] = {key: value for key, value in record.config.items() if key not in paths}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _count(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
