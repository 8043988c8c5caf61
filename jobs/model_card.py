"""The model card of an exported model: README.md with YAML front matter, filled from the run that made the model.

In: the language model, what transformers' patcher does not follow, and, where they are known, the record of the
training run and an evaluation. Out: Markdown. Nothing is said that is not recorded.
"""

from collections.abc import Sequence
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
    return environment.get_template("card.md.jinja").render(
        front_matter=_front_matter(facts.license),
        title=facts.title,
        parameters=_count(model.model),
        entropy_parameters=0 if model.entropy_model is None else _count(model.entropy_model),
        rule=rule_text(model.patch_rule, model.reset_on_newline),
        differences=facts.differences,
        max_patch_length=model.patch_rule.max_patch_length,
        facts=_training(model, facts.training),
        evaluation=facts.evaluation,
        licence=_licence(facts.license),
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


def _training(model: LanguageModel, record: JobRecord | None) -> dict[str, str]:
    """Rows of the table: what the checkpoint carries, then what its run recorded."""
    names = {"data": "data manifest", "run": "run", "step": "updates", "imported_from": "imported from"}
    rows = {names.get(key, key): f"`{_cell(value)}`" for key, value in model.provenance.items()}
    if record is None:
        return rows
    if record.result.bytes is not None:
        rows["bytes trained on, repeats counted"] = f"{record.result.bytes:,}"
    if record.result.bpb is not None:
        rows["bits per byte on the held-out split, in training's sequences"] = f"{record.result.bpb}"
    return rows


def _cell(text: str) -> str:
    """Text that stays in its cell of a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("`", "'")


def _configuration(model: LanguageModel, record: JobRecord | None) -> str:
    """YAML of the model's shape, and of the run's settings where they are recorded, without its paths."""
    values: dict[str, Any] = {"model": to_json(model.config), "patch_rule": to_json(model.patch_rule)}
    if record is not None:
        paths = ("model", "data", "documents", "entropy_model", "output")
        values["training"] = {key: value for key, value in record.config.items() if key not in paths}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _count(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
