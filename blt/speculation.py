"""Self-speculation: a document's own decoder writes some bytes ahead, before the entropy model has spoken.

Inside a patch a byte's logits need neither entropy model nor latent transformer; only a new patch does. So the most
likely bytes are drafted as if no patch ended, and the entropy model reads all of them at once, which takes little more
than reading one: most of a step is reading its weights. A draft is used as far as its bytes are those that are asked
for and no patch ends before them; the rest is taken back. Logits are those of `Decoder`, up to rounding.
Shapes: T bytes of a draft, D width, V vocabulary, H key heads, G query heads of each, N heads of queries, keys and
values together, K head width, C columns of a cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from blt.attention import place_attention
from blt.checkpoint import LanguageModel
from blt.decoder import Decoder
from blt.decoding_cache import StackCache
from blt.entropy_model import EntropyModel, next_byte_entropy, starts_again
from blt.errors import ConfigError
from blt.layers import TransformerConfig, rotate
from blt.model import BLT
from blt.online_blt import OnlineBLT
from blt.online_entropies import NEWLINE, OnlineEntropies
from blt.online_patches import OnlinePatches
from blt.patching import PatchRule
from blt.vocabulary import BYTE_OFFSET

LONGEST_DRAFT = 8
"""Bytes; a cache has as many places beyond its window, which a draft that is taken back may have overwritten."""


class SpeculativeDecoder(Decoder):
    """A `Decoder` of one document that reads ahead. ConfigError for a rule that reads no entropies."""

    def __init__(self, lm: LanguageModel) -> None:
        if not lm.patch_rule.needs_entropies:
            raise ConfigError(f"patch rule: kind {lm.patch_rule.kind} reads no entropies, so nothing is gained ahead")
        with torch.inference_mode():
            self._patches = OnlinePatches(lm.patch_rule, lm.entropy_model, lm.reset_on_newline, 1, self._entropies_of)
            self._model = self._drafting = DraftingBLT(lm.model)
        self._draft = Draft(self._entropies, self._drafting, _doubt_at_ends(lm.patch_rule))
        self.starts = []

    @torch.inference_mode()
    def step(self, ids: Sequence[int]) -> Tensor:
        """Logits [1,V] after one more byte, given as its id."""
        (byte_id,) = ids
        drafted = self._draft.next(byte_id)
        self.starts = self._patches.advance(ids, [drafted.nats])
        if not self.starts[0]:
            return drafted.logits_1V
        self._draft.drop(decoded_again=1)
        return self._drafting.next_patch(drafted.state_11D)

    def _entropies_of(self, model: EntropyModel, reset_on_newline: bool, num_documents: int) -> "RunEntropies":
        assert num_documents == 1
        self._entropies = RunEntropies(model, reset_on_newline)
        return self._entropies


def _doubt_at_ends(rule: PatchRule) -> float:
    """Entropy of a next byte in nats above which the rule ends a patch; infinite if there is more that it looks at."""
    return rule.threshold if rule.kind == "entropy" and not rule.monotonic else float("inf")


@dataclass(frozen=True)
class Drafted:
    """A byte that was read ahead."""

    byte_id: int
    state_11D: Tensor
    """Of the encoder, which the decoder reads."""
    logits_1V: Tensor
    """After the byte, if no patch ends with it."""
    nats: float
    """The entropy made at it."""


class Draft:
    """Bytes read ahead of a document, the last of which may be taken back."""

    def __init__(self, entropies: "RunEntropies", model: "DraftingBLT", doubt_at_ends: float) -> None:
        self._entropies, self._model, self._doubt_at_ends = entropies, model, doubt_at_ends
        self._ahead: list[Drafted] = []
        self._used, self._limit = 0, LONGEST_DRAFT // 2
        """Bytes of this draft that became the document's, and the most that the next one may have."""

    def next(self, byte_id: int) -> Drafted:
        """The next byte of the document, read before or now."""
        if not self._ahead or self._ahead[0].byte_id != byte_id:
            self.drop()
            self._ahead = self._read_ahead(byte_id)
        self._used += 1
        return self._ahead.pop(0)

    def drop(self, decoded_again: int = 0) -> None:
        """Take back what is ahead, and of the decoder as many bytes more."""
        left = len(self._ahead)
        self._entropies.rewind(left)
        self._model.rewind(left, left + decoded_again)
        self._ahead = []
        if self._used:
            # As long as what was of use of this one; a byte longer where all of it was.
            self._limit = self._used if left else min(self._limit + 1, LONGEST_DRAFT)
        self._used = 0

    def _read_ahead(self, byte_id: int) -> list[Drafted]:
        """This byte and those that are likely to follow it, before a patch is likely to end."""
        ids, states, logits = list[int](), list[Tensor](), list[Tensor]()
        while True:
            ids.append(byte_id)
            states.append(self._model.read(byte_id))
            logits.append(self._model.decode(states[-1]))
            if len(ids) == self._limit:
                break
            # The decoder's doubt stands in for that of the entropy model.
            if float(next_byte_entropy(logits[-1])) > self._doubt_at_ends:
                break
            byte_id = int(logits[-1][0, BYTE_OFFSET:].argmax()) + BYTE_OFFSET
            if self._entropies.opens_context(byte_id, len(ids)):
                break
        nats = self._entropies.run(ids).tolist()
        return [Drafted(*of_byte) for of_byte in zip(ids, states, logits, nats, strict=True)]


class RunEntropies(OnlineEntropies):
    """`OnlineEntropies` of one document that read several ids at a time and can take back the last."""

    def __init__(self, model: EntropyModel, reset_on_newline: bool) -> None:
        super().__init__(model, reset_on_newline, 1, RunCache)

    def run(self, ids: Sequence[int]) -> Tensor:
        """Entropies [T] made at the next ids, of which the first alone may open a context."""
        self._open_context(0, ids[0])
        self._read[0] += len(ids) - 1
        ids_T1 = torch.tensor(ids, device=self._cache.device)[:, None]
        return next_byte_entropy(self._steps.logits(ids_T1, _runs(self._cache).run(len(ids)))[:, 0]).cpu()

    def rewind(self, num_ids: int) -> None:
        """Forget the last ids that were read."""
        self._read[0] -= num_ids
        _runs(self._cache).rewind(num_ids)

    def opens_context(self, byte_id: int, num_ahead: int) -> bool:
        """Whether this id opens a context, or its positions start again, after as many ids ahead of those read."""
        return (self.reset_on_newline and byte_id == NEWLINE) or starts_again(self._read[0] + num_ahead)


class DraftingBLT(OnlineBLT):
    """`OnlineBLT` of one document whose bytes can be taken back as far as the patch that it is in."""

    def __init__(self, model: BLT) -> None:
        super().__init__(model, 1, RunCache)
        self._windows: list[Tensor] = []
        """What was hashed before each of the last bytes."""

    def read(self, byte_id: int) -> Tensor:
        """Encoder state [1,1,D] of one more byte."""
        if self._hashes is not None:
            self._windows = [*self._windows[1 - LONGEST_DRAFT :], self._hashes.ids_BL]
        return self._read([byte_id])

    def decode(self, state_11D: Tensor) -> Tensor:
        """Logits [1,V] after the byte with this encoder state, if its patch goes on."""
        return self._decode(state_11D)

    def next_patch(self, state_11D: Tensor) -> Tensor:
        """The same if its patch ends with it."""
        self._end_patches([0])
        return self._decode(state_11D)

    def rewind(self, num_read: int, num_decoded: int) -> None:
        """Forget the last bytes that were read, and those that were decoded."""
        _runs(self._encoder).rewind(num_read)
        _runs(self._decoder).rewind(num_decoded)
        if num_read:
            del self._open[0][-num_read:]
            if self._hashes is not None:
                self._hashes.ids_BL = self._windows[-num_read]
                del self._windows[-num_read:]


class RunCache(StackCache):
    """A `StackCache` of one row that reads several positions at a time and can take back the last."""

    def __init__(self, config: TransformerConfig, num_rows: int, like: Tensor) -> None:
        assert num_rows == 1
        ring = None if config.window is None else config.window + LONGEST_DRAFT
        super().__init__(replace(config, window=ring), num_rows, like)
        self._window = config.window

    def step(self, rows: Sequence[int] | None = None) -> "RunStep":  # type: ignore[override]  # another memory
        """The memory of one more position."""
        assert rows is None or list(rows) == [0]
        return self.run(1)

    def run(self, length: int) -> "RunStep":
        """The memory of the next positions, which it counts as read; without a window, of one."""
        assert length == 1 or self._window is not None
        self._reserve(length)
        (first,), (position,) = self.counts, self.positions
        columns = min(first + length, self._columns)
        self.counts[0] += length
        self.positions[0] += length
        return RunStep(
            pairs=[pairs[:, 0] for pairs in self._pairs],
            written_at=torch.arange(first, first + length, device=self.device) % self._columns,
            rotations_T1NC=self._turns_of_heads(self._rotations[position : position + length]),
            columns=columns,
            mask_1QC=self._mask(first, length, columns),
        )

    def rewind(self, num_positions: int) -> None:
        """Forget the last positions, no more than a draft has."""
        self.counts[0] -= num_positions
        self.positions[0] -= num_positions

    def _mask(self, first: int, length: int, columns: int) -> Tensor | None:
        """What each query does not see of the columns as they are after the run, or None where each sees all."""
        last = first + length - 1
        if length == 1 and (self._window is None or last < self._window):
            return None
        assert self._window is not None
        # A column holds the newest of the positions that fall into it.
        held_C = last - (last - torch.arange(columns, device=self.device)) % self._columns
        query_T1 = torch.arange(first, last + 1, device=self.device)[:, None]
        hidden_TC = (held_C > query_T1) | (held_C <= query_T1 - self._window)
        mask_TC = torch.zeros(hidden_TC.shape, device=self.device, dtype=self.dtype).masked_fill_(hidden_TC, -torch.inf)
        return mask_TC.repeat_interleave(self.config.heads // self.config.num_kv_heads, 0)[None]


@dataclass(frozen=True, kw_only=True)
class RunStep:
    """The memory of T positions of one row, which come as T rows of one position."""

    pairs: Sequence[Tensor]
    """Of each layer, keys and values [2,H,C,K]."""
    written_at: Tensor
    """Columns int64 [T] of the new keys and values."""
    rotations_T1NC: Tensor
    """What each head is multiplied with: rotations, of queries scaled ones, of values 1."""
    columns: int
    mask_1QC: Tensor | None
    """Of the T x G queries of a key head."""

    def attend(self, layer: int, qkv_T1NK: Tensor, heads: int) -> Tensor:
        """Attention output [T,1,H * G,K] of the positions' unrotated queries, keys and values."""
        pairs_2HCK, turned_TNK = self.pairs[layer], rotate(qkv_T1NK, self.rotations_T1NC)[:, 0]
        length, kv_heads = len(turned_TNK), pairs_2HCK.shape[1]
        new_T2HK = turned_TNK[:, heads:].unflatten(1, (2, kv_heads))
        pairs_2HCK.index_copy_(2, self.written_at, new_T2HK.permute(1, 2, 0, 3))
        keys, values = pairs_2HCK[:, :, : self.columns].unbind()
        q_HTGK = turned_TNK[:, :heads].unflatten(1, (kv_heads, -1)).transpose(0, 1)
        mixed_HQK = place_attention(q_HTGK.flatten(1, 2), keys, values, self.mask_1QC)
        mixed_HTGK: Tensor = mixed_HQK.unflatten(1, (length, -1))
        return mixed_HTGK.transpose(0, 1).flatten(1, 2)[:, None]


def _runs(cache: StackCache) -> RunCache:
    assert isinstance(cache, RunCache)
    return cache
