"""A language model with random weights in a directory, for tests that load one."""

from pathlib import Path

from blt.checkpoint import LanguageModel, fingerprint, save_language_model
from blt.entropy_model import EntropyModel, EntropyModelConfig
from blt.model import BLT
from blt.patching import PatchRule
from tests.model_cases import blt_config, randomised, transformer_config

RULE = PatchRule(threshold=3.0, max_patch_length=6)


def small_language_model(rule: PatchRule = RULE) -> LanguageModel:
    """A BLT of width 16 and an entropy model of one layer, the same in every call."""
    entropy_model = randomised(EntropyModel(EntropyModelConfig(transformer=transformer_config()))).eval()
    return LanguageModel(
        model=randomised(BLT(blt_config()), seed=1).eval(),
        entropy_model=entropy_model if rule.needs_entropies else None,
        patch_rule=rule,
        reset_on_newline=False,
        config=blt_config(),
        provenance={},
        entropy_fingerprint=fingerprint(entropy_model) if rule.needs_entropies else None,
    )


def save_small_language_model(directory: Path, rule: PatchRule = RULE) -> str:
    """Write it; returns the directory."""
    save_language_model(small_language_model(rule), directory)
    return str(directory)
