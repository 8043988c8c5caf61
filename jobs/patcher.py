"""What cuts text into patches: an entropy model, a rule and the newline reset, from a model's directory.

A language model brings all three; of an entropy model alone the rule has to be given.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from blt.checkpoint import (
    entropy_model_fingerprint,
    language_model_config,
    load_entropy_model,
    model_kind,
)
from blt.entropy_model import EntropyModel, document_entropies
from blt.errors import CheckpointError, ConfigError
from blt.patching import PatchRule, document_patch_starts, quantize_entropies, stored_entropies
from jobs.patched_text import PatchedText
from pipelines.model_files import local_model


@dataclass(frozen=True, kw_only=True)
class Patcher:
    """Cuts documents into patches."""

    entropy_model: EntropyModel | None
    """Never None for a rule that reads entropies; where it is there, entropies are computed for other rules too."""
    rule: PatchRule
    reset_on_newline: bool

    def patch(self, text: bytes) -> PatchedText:
        """The patches and entropies of a document; entropies as the rule compares them."""
        entropies = None
        if self.entropy_model is not None:
            entropies = document_entropies(self.entropy_model, [text], reset_on_newline=self.reset_on_newline)[0]
            if self.rule.quantized:
                entropies = stored_entropies(quantize_entropies(entropies))
        starts = document_patch_starts(text, entropies if self.rule.needs_entropies else None, self.rule)
        return PatchedText(
            text=text,
            starts=tuple(starts[: len(text)].tolist()),
            entropies=None if entropies is None else tuple(entropies[: len(text)].tolist()),
            rule=self.rule,
            reset_on_newline=self.reset_on_newline,
        )


def load_patcher(
    uri: str,
    *,
    rule: PatchRule | None = None,
    threshold: float | None = None,
    reset_on_newline: bool | None = None,
    device: str = "cpu",
) -> Patcher:
    """The patcher of the model directory `uri`, of which only the entropy model is loaded.

    `rule` goes before that of a language model, `threshold` before that of either rule, `reset_on_newline` before the
    model's (an entropy model alone has none, and does not reset). ConfigError for an entropy model without a rule, and
    for a rule that reads entropies with a language model that was saved without its entropy model; CheckpointError for
    what cannot be loaded.
    """
    directory = Path(local_model(uri))
    if model_kind(directory) == "entropy_model":
        found = rule or (PatchRule() if threshold is not None else None)
        if found is None:
            raise ConfigError(f"model {uri} is an entropy model alone: give threshold, or a rule")
        model: EntropyModel | None = load_entropy_model(directory, device)
        reset = reset_on_newline or False
    else:
        stored = language_model_config(directory)
        found = rule or stored.patch_rule
        model = _entropy_model_of(directory, device) if stored.entropy_stored else None
        reset = stored.reset_on_newline if reset_on_newline is None else reset_on_newline
    if threshold is not None:
        if found.kind != "entropy":
            raise ConfigError(f"threshold is for rules of kind entropy, this one is of kind {found.kind}")
        found = replace(found, threshold=threshold)
    if found.needs_entropies and model is None:
        raise ConfigError(
            f"model {uri} was saved without the entropy model that rule.kind {found.kind} needs: give the directory of "
            "that, with its rule"
        )
    return Patcher(entropy_model=model, rule=found, reset_on_newline=reset)


def _entropy_model_of(directory: Path, device: str) -> EntropyModel:
    """The entropy model in a language model's directory; CheckpointError if the BLT was trained with another."""
    stated, part = language_model_config(directory).entropy_fingerprint, directory / "entropy_model"
    if entropy_model_fingerprint(part) != stated:
        raise CheckpointError(f"{part}: is not the entropy model {stated} that {directory} was trained with")
    return load_entropy_model(part, device)
