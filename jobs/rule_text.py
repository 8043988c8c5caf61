"""A patch rule in words, for people."""

from blt.patching import PatchRule


def rule_text(rule: PatchRule, reset_on_newline: bool) -> str:
    """The keys of the rule that are set: "kind entropy, threshold 1.5, max patch length 512, quantized"."""
    told = [
        key if value is True else f"{key} {value}" for key, value in vars(rule).items() if value not in (None, False)
    ]
    return ", ".join(told).replace("_", " ") + (", entropies start anew at each newline" if reset_on_newline else "")
