"""How a model's text is patched: its directory in, entropy model, rule and reset out; and whether patches are those
that it was trained on: what made them and its config.json in, what differs out.

The pipeline always has a longest patch; a rule without one, as imported models have, is that with the usual limit.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from blt.checkpoint import LanguageModelConfig
from blt.errors import CheckpointError, ConfigError
from blt.patching import PatchRule
from pipelines.manifest import Patching
from pipelines.model_files import model_config, model_fingerprint, model_kind_of
from pipelines.storage import Storage

DEFAULT_MAX_PATCH_LENGTH = 512
"""Longest patch in bytes where the rule sets no limit: the pipeline always has one, for patches must fit a sequence."""

DEFAULT_RULE = PatchRule(max_patch_length=DEFAULT_MAX_PATCH_LENGTH)
"""Of commands that are given none."""


def limited(rule: PatchRule) -> PatchRule:
    """The rule with the pipeline's limit on patch length where it sets none."""
    if rule.max_patch_length is not None:
        return rule
    return dataclasses.replace(rule, max_patch_length=DEFAULT_MAX_PATCH_LENGTH)


@dataclass(frozen=True, kw_only=True)
class ModelPatching:
    """What cuts text into the patches that a BLT was trained on."""

    entropy_model: str | None
    """Directory of the entropy model, inside that of the BLT; None for a rule that needs none."""
    rule: PatchRule
    """With a longest patch."""
    reset_on_newline: bool


def model_patching(uri: str) -> ModelPatching:
    """How the text of the BLT in the directory `uri` is patched; only files of configuration are read.

    ConfigError for an entropy model alone, and for a BLT that was saved without the entropy model that its rule needs;
    CheckpointError for what is missing or broken, and for an entropy model that the BLT was not trained with.
    """
    if model_kind_of(uri) == "entropy_model":
        raise ConfigError(f"{uri} is an entropy model alone, which has no rule: give it as entropy_model, and a rule")
    stored, directory = model_config(uri), Storage(uri).url("entropy_model")
    rule = limited(stored.patch_rule)
    if not rule.needs_entropies:
        return ModelPatching(entropy_model=None, rule=rule, reset_on_newline=stored.reset_on_newline)
    if not stored.entropy_stored:
        raise ConfigError(
            f"{uri} was saved without the entropy model that its rule needs ({str(stored.entropy_fingerprint)[:12]}): "
            "give its directory as entropy_model, and the rule"
        )
    if (found := model_fingerprint(directory)) != stored.entropy_fingerprint:
        raise CheckpointError(
            f"{directory}: is not the entropy model that {uri} was trained with: its fingerprint is {found[:12]}, not "
            f"{str(stored.entropy_fingerprint)[:12]}"
        )
    return ModelPatching(entropy_model=directory, rule=rule, reset_on_newline=stored.reset_on_newline)


def patching_differences(patching: Patching, model: LanguageModelConfig) -> list[str]:
    """What of the patching is not the model's, with both values; where entropies were computed is no matter."""
    entropy_model = model.entropy_fingerprint if model.patch_rule.needs_entropies else None
    there = _identity(patching.entropy_model, patching.rule, patching.reset_on_newline)
    here = _identity(entropy_model, limited(model.patch_rule), model.reset_on_newline)
    return [f"{name} is {there[name]} there, {here[name]} for the model" for name in there if there[name] != here[name]]


def _identity(entropy_model: str | None, rule: PatchRule, reset_on_newline: bool) -> Mapping[str, str]:
    """What must agree, each by a name and a short text that tells two of them apart."""
    parts = {f"rule.{name}": str(value) for name, value in msgspec.to_builtins(rule).items()}
    model = str(entropy_model and entropy_model[:12])
    return {"entropy_model": model, **parts, "reset_on_newline": str(reset_on_newline)}
