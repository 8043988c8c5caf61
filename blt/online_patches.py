"""The patches of documents that are still being written: bytes in as they come, patch starts out.

The same rule and the same entropies (`blt.online_entropies`) as for whole documents; the rule is applied to the end of
each document.
Shapes: B documents, T ids, n bytes of a document. Entropies are nats, float32, on the CPU.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from blt.entropy_model import EntropyModel
from blt.errors import ConfigError
from blt.online_entropies import OnlineEntropies
from blt.patching import PatchRule, document_patch_starts, patch_starts
from blt.recorded_steps import online_entropies
from blt.vocabulary import BOS, encode

DECIDING_IDS = 4
"""Ids at the end of a row that decide whether the next byte starts a patch: no rule reads more than two, and the
first three of a row are special cases of some rules, which must not be met again further on."""


class OnlinePatches:
    """Where the patches of BOS and the bytes so far start, and whether the byte to come starts one.

    ConfigError for a rule that looks ahead (top_k), or that reads entropies where there is no entropy model.
    """

    def __init__(
        self,
        rule: PatchRule,
        entropy_model: EntropyModel | None,
        reset_on_newline: bool,
        num_documents: int = 1,
        entropies_of: Callable[[EntropyModel, bool, int], OnlineEntropies] = online_entropies,
    ) -> None:
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
        self.rule = rule
        self._uncut = replace(rule, max_patch_length=None)
        self._entropies: OnlineEntropies | None = None
        if rule.needs_entropies and entropy_model is not None:
            self._entropies = entropies_of(entropy_model, reset_on_newline, num_documents)
        self._ends: list[list[tuple[int, float]]] = [[] for _ in range(num_documents)]
        """The last DECIDING_IDS ids of each document, BOS included, each with the entropy made at it."""
        self._num_bytes = [0] * num_documents
        self._latest = [0] * num_documents
        """Index of the byte at which each document's latest patch would have started if no patch were too long."""

    def open(self, document: int, prompt: bytes) -> Tensor:
        """Bool [n + 1] as `document_patch_starts`: the last entry says whether the byte to come starts a patch."""
        ids = [BOS, *encode(prompt[-DECIDING_IDS:]).tolist()]
        entropies = None
        if self._entropies is not None:
            entropies = self._entropies.open(document, torch.cat((torch.tensor([BOS]), encode(prompt))))
        nats = [0.0] * (len(prompt) + 1) if entropies is None else entropies.tolist()
        end = slice(-min(DECIDING_IDS, len(prompt) + 1), None)
        self._ends[document] = list(zip(ids[end], nats[end], strict=True))
        self._num_bytes[document] = len(prompt)
        self._latest[document] = int(document_patch_starts(prompt, entropies, self._uncut).nonzero()[-1])
        return document_patch_starts(prompt, entropies, self.rule)

    def step(self, ids: Sequence[int]) -> list[bool]:
        """Whether, after one more byte (its id) in each document, the byte to come starts a patch."""
        return self.advance(ids, [0.0] * len(ids) if self._entropies is None else self._entropies.step(ids).tolist())

    def advance(self, ids: Sequence[int], nats: Sequence[float]) -> list[bool]:
        """The same where the entropies made at these bytes are known."""
        for document, end in enumerate(zip(ids, nats, strict=True)):
            self._ends[document] = [*self._ends[document][1 - DECIDING_IDS :], end]
            self._num_bytes[document] += 1
        found = self._decisions()
        for document, starts in enumerate(found):
            if starts:
                self._latest[document] = self._num_bytes[document]
            elif self.rule.max_patch_length is not None:
                length = self._num_bytes[document] - self._latest[document]
                found[document] = length % self.rule.max_patch_length == 0
        return found

    def keep(self, documents: Sequence[int]) -> None:
        """Only these documents go on, in this order."""
        if self._entropies is not None:
            self._entropies.keep(documents)
        self._ends = [self._ends[document] for document in documents]
        self._num_bytes = [self._num_bytes[document] for document in documents]
        self._latest = [self._latest[document] for document in documents]

    def _decisions(self) -> list[bool]:
        """What the rule says of each document's byte to come, whatever the longest patch is."""
        if self.rule.kind in ("fixed", "byte"):
            size = int(self.rule.patch_size or 1) if self.rule.kind == "fixed" else 1
            return [num_bytes % size == 0 for num_bytes in self._num_bytes]
        found = [False] * len(self._ends)
        for length in {len(end) for end in self._ends}:
            documents = [document for document, end in enumerate(self._ends) if len(end) == length]
            ids_BT = torch.tensor([[byte_id for byte_id, _ in self._ends[document]] for document in documents])
            nats_BT = torch.tensor([[nats for _, nats in self._ends[document]] for document in documents])
            starts = patch_starts(ids_BT, nats_BT, self._uncut, include_next=True)[:, -1].tolist()
            for document, start in zip(documents, starts, strict=True):
                found[document] = start
        return found
