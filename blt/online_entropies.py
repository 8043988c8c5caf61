"""Next-byte entropies of documents that are still being written: ids in as they come, nats out.

Each byte is read once, in the context that `document_entropies` gives it (BOS first, a new context at newlines where
the patches were made so, positions and the carried window of long documents), so its entropy is the same to 1e-4 nats
in float32. Shapes: B documents, T ids. Entropies are float32, on the CPU.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from blt.decoding_cache import StackCache
from blt.entropy_model import ContextStream, EntropyModel, next_byte_entropy, starts_again
from blt.step_blocks import entropy_model_for_steps
from blt.vocabulary import encode

NEWLINE = int(encode(b"\n"))


class OnlineEntropies:
    """Next-byte entropies of growing documents."""

    def __init__(
        self, model: EntropyModel, reset_on_newline: bool, num_documents: int, cache_type: type[StackCache] = StackCache
    ) -> None:
        self.model, self._steps, self.reset_on_newline = model, entropy_model_for_steps(model), reset_on_newline
        self._cache = cache_type(model.config.transformer, num_documents, model.output.weight)
        self._read = [0] * num_documents

    def open(self, document: int, ids_T: Tensor) -> Tensor:
        """Entropies [T] made at the first ids (int64, at least one) of a document."""
        opens = torch.nonzero(ids_T == NEWLINE).flatten().tolist() if self.reset_on_newline else []
        parts = []
        for run_T in ids_T.tensor_split(opens):
            if len(run_T):
                context = ContextStream(self.model)
                parts.append(next_byte_entropy(context.feed(run_T.to(self._cache.device)[None])[0]).cpu())
        self._cache.load(document, context.reader)
        self._read[document] = context.position
        return torch.cat(parts)

    def step(self, ids: Sequence[int]) -> Tensor:
        """Entropies [B] made at the next id of each document."""
        for document, byte_id in enumerate(ids):
            self._open_context(document, byte_id)
        ids_BT = torch.tensor(ids, device=self._cache.device)[:, None]
        return next_byte_entropy(self._steps.logits(ids_BT, self._cache.step())[:, 0]).cpu()

    def keep(self, documents: Sequence[int]) -> None:
        """Only these documents go on, in this order."""
        self._cache.keep(documents)
        self._read = [self._read[document] for document in documents]

    def _open_context(self, row: int, byte_id: int) -> None:
        """Begin a context, or its positions, again where this id of a row does so; count it as read."""
        if self.reset_on_newline and byte_id == NEWLINE:
            self._cache.clear(row)
            self._read[row] = 0
        elif starts_again(self._read[row]):
            self._cache.rebase(row, self.model.config.window - 1)
        self._read[row] += 1
