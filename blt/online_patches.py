"""The patches of a document that is still being written: bytes in as they come, patch lengths out.

The same rule and the same entropies as for a whole document: `EntropyStream` reads each byte once, in the context
that `document_entropies` gives it (BOS first, a new context at newlines where the patches were made so, positions
and the carried window of long documents), and `OnlinePatches` applies the rule to all bytes so far.
Shapes: B = 1 row, T ids, P patches. Entropies are nats, float32, on the CPU.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from blt.entropy_model import ContextStream, EntropyModel, next_byte_entropy
from blt.errors import ConfigError
from blt.patching import PatchRule, document_patch_starts, starts_to_lengths
from blt.vocabulary import BOS, encode


class EntropyStream:
    """Next-byte entropies of one growing document; equal to those of `document_entropies` to 1e-4 nats in float32."""

    def __init__(self, model: EntropyModel, reset_on_newline: bool) -> None:
        self.model, self.reset_on_newline = model, reset_on_newline
        self._context = ContextStream(model)

    def feed(self, ids_T: Tensor) -> Tensor:
        """Entropies [T] made at each of the ids (int64) that follow those fed before."""
        opens = torch.nonzero(ids_T == encode(b"\n")).flatten().tolist() if self.reset_on_newline else []
        parts = []
        for index, run_T in enumerate(ids_T.tensor_split(opens)):
            if index > 0:
                self._context = ContextStream(self.model)
            if len(run_T):
                logits_TV = self._context.feed(run_T.to(self.model.output.weight.device))
                parts.append(next_byte_entropy(logits_TV).cpu())
        return torch.cat(parts) if parts else torch.empty(0)


class OnlinePatches:
    """Patch lengths of BOS and the bytes so far, the virtual next byte included.

    ConfigError for a rule that looks ahead (top_k), or that reads entropies where there is no entropy model.
    """

    def __init__(self, rule: PatchRule, entropy_model: EntropyModel | None, reset_on_newline: bool) -> None:
        if rule.kind == "top_k":
            raise ConfigError(
                "patch rule: kind top_k looks ahead in the document, so bytes cannot be generated with it; "
                "kinds entropy, space, fixed and byte can"
            )
        if rule.needs_entropies and entropy_model is None:
            raise ConfigError(
                f"patch rule: kind {rule.kind} needs the entropy model that the patches were made with, "
                "but the language model was saved or loaded without one"
            )
        self.rule, self.document = rule, b""
        self._stream: EntropyStream | None = None
        self._entropies = torch.empty(0)
        if rule.needs_entropies and entropy_model is not None:
            self._stream = EntropyStream(entropy_model, reset_on_newline)
            self._entropies = self._stream.feed(torch.tensor([BOS]))

    def feed(self, new: bytes) -> None:
        """Append bytes to the document."""
        self.document += new
        if self._stream is not None:
            self._entropies = torch.cat((self._entropies, self._stream.feed(encode(new))))

    def starts(self) -> Tensor:
        """Bool [n + 1] as `document_patch_starts`: the last entry says whether the byte to come starts a patch."""
        return document_patch_starts(self.document, self._entropies if self._stream is not None else None, self.rule)

    def lengths(self) -> Tensor:
        """Patch lengths int64 [P] of BOS, the n bytes and the byte to come: they sum to n + 2, the first is 1."""
        return starts_to_lengths(F.pad(self.starts(), (1, 0), value=True)[None])[0]
