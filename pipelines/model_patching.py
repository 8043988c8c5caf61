"""Whether patches are those that a model was trained on: what made them and the model's config.json in, what differs
out.

The pipeline always has a longest patch; a rule without one, as imported models have, is that with the usual limit.
"""

import dataclasses
from collections.abc import Mapping

import msgspec

from blt.checkpoint import LanguageModelConfig
from blt.patching import PatchRule
from pipelines.manifest import Patching

DEFAULT_MAX_PATCH_LENGTH = 512
"""Longest patch in bytes where the rule sets no limit: the pipeline always has one, for patches must fit a sequence."""


def limited(rule: PatchRule) -> PatchRule:
    """The rule with the pipeline's limit on patch length where it sets none."""
    if rule.max_patch_length is not None:
        return rule
    return dataclasses.replace(rule, max_patch_length=DEFAULT_MAX_PATCH_LENGTH)


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
