"""Documents being written by a language model: the next byte of each in, logits of the byte after it out.

Patches are found as the bytes come (`blt.online_patches`), and the model reads them as they end (`blt.online_blt`).
Shapes: B documents, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from blt.checkpoint import LanguageModel
from blt.online_patches import OnlinePatches
from blt.recorded_steps import online_blt
from blt.vocabulary import BOS, encode


class Decoder:
    """Documents being written: bytes in, logits of the byte after them out. `open` comes first, once."""

    def __init__(self, lm: LanguageModel, num_documents: int) -> None:
        with torch.inference_mode():
            self._patches = OnlinePatches(lm.patch_rule, lm.entropy_model, lm.reset_on_newline, num_documents)
            self._model = online_blt(lm.model, num_documents)
        self.starts: list[bool] = []
        """Whether the byte to come of each document starts a patch."""

    @torch.inference_mode()
    def open(self, prompts: Sequence[bytes]) -> Tensor:
        """Logits [B,V] of the byte that follows BOS and each prompt (which may be empty)."""
        rows = []
        for document, prompt in enumerate(prompts):
            starts = F.pad(self._patches.open(document, prompt), (1, 0), value=True)
            self.starts.append(bool(starts[-1]))
            rows.append(self._model.open(document, F.pad(encode(prompt), (1, 0), value=BOS), starts))
        return torch.stack(rows)

    @torch.inference_mode()
    def step(self, ids: Sequence[int]) -> Tensor:
        """Logits [B,V] after one more byte, given as its id, of each document."""
        self.starts = self._patches.step(ids)
        return self._model.step(ids, self.starts)

    @torch.inference_mode()
    def keep(self, documents: Sequence[int]) -> None:
        """Only these documents go on, in this order."""
        self._patches.keep(documents)
        self._model.keep(documents)
        self.starts = [self.starts[document] for document in documents]
