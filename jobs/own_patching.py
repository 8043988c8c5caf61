"""The patching of a BLT in the place of a command's keys: entropy model, rule and reset, with no other given beside."""

from blt.errors import ConfigError
from blt.patching import PatchRule
from pipelines.model_patching import DEFAULT_RULE, ModelPatching, model_patching


def own_patching(model: str, *, entropy_model: str | None, rule: PatchRule, reset_on_newline: bool) -> ModelPatching:
    """How the text of the BLT in the directory `model` is patched; the others are the command's keys of these names.

    ConfigError, naming the key and both values, for one that is given and says otherwise; what `model_patching` raises.
    """
    hint = f'leave it out, or leave out "model" and give entropy_model={model.rstrip("/")}/entropy_model and the rule'
    if entropy_model is not None:
        raise ConfigError(f'key "entropy_model": is that of {model}, which the key "model" names; {hint}')
    found = model_patching(model)
    if rule not in (DEFAULT_RULE, found.rule):
        differing = ", ".join(
            f"rule.{name} is {getattr(rule, name)} here, {getattr(found.rule, name)} for the model"
            for name in vars(rule)
            if getattr(rule, name) not in (getattr(DEFAULT_RULE, name), getattr(found.rule, name))
        )
        raise ConfigError(f'key "rule": comes from {model}, which the key "model" names: {differing}; {hint}')
    if reset_on_newline and not found.reset_on_newline:
        raise ConfigError(
            f'key "reset_on_newline": is true here, false for {model}, which the key "model" names; {hint}'
        )
    return found
