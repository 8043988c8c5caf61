"""Keys and values of the positions read before: what a stack of blocks needs to go on where it stopped.

`CarriedContext` reads a chunk of rows after the chunks before it; `StackCache` then reads one position of several
rows at a time, each row at a place of its own. Both are a `Memory`: the blocks are those of a forward pass.
Shapes: B rows of the cache, R rows of a step, T positions of a chunk, H heads, G query heads of a key head, K head
width, N heads of queries, keys and values together, C columns (places) of a row, P positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blt.attention import place_attention
from blt.layers import Context, TransformerConfig, context, rotate, rotations, split_heads

KeyValue = tuple[Tensor, Tensor]
"""Unrotated keys and values [B,C,H,K] of the last C positions of rows."""

FIRST_COLUMNS = 64
"""Places that a row of a cache without a window begins with; they double when they are full."""


@dataclass(frozen=True)
class CarriedContext:
    """A context that sees `carry`, one pair per layer, and puts the pairs of all positions into `pairs`."""

    shared: Context
    carry: Sequence[KeyValue]
    pairs: list[KeyValue]

    def attend(self, layer: int, qkv_BTNK: Tensor, heads: int) -> Tensor:
        q, k, v = split_heads(qkv_BTNK, heads)
        if self.carry:
            k, v = torch.cat((self.carry[layer][0], k), 1), torch.cat((self.carry[layer][1], v), 1)
        self.pairs.append((k, v))
        return self.shared.attend_to(q, k, v)


class RowReader:
    """Contexts of the consecutive chunks of rows of the same length; keeps what the chunks to come may see."""

    def __init__(self, config: TransformerConfig, num_rows: int = 1) -> None:
        self.config, self.num_rows = config, num_rows
        self.position = 0
        """Rotary position of the next chunk's first place."""
        self.pairs: list[KeyValue] = []
        """Of each layer, the last window - 1 positions read, or all where there is no window."""

    def chunk(self, length: int, device: torch.device) -> CarriedContext:
        """The context of the next `length` positions; `close` follows when all layers have read them."""
        self._drop_unseen()
        carried = self.pairs[0][0].shape[1] if self.pairs else 0
        positions = torch.arange(self.position, self.position + length, device=device).expand(self.num_rows, -1)
        shared = context(self.config, torch.zeros_like(positions), positions, carried)
        carry, self.pairs = self.pairs, []
        self.position += length
        return CarriedContext(shared, carry, self.pairs)

    def keep(self, num_rows: int) -> None:
        """Only the first rows go on."""
        self.num_rows = num_rows
        self.pairs = [(k[:num_rows], v[:num_rows]) for k, v in self.pairs]

    def _drop_unseen(self) -> None:
        if self.config.window is not None:
            kept = self.config.window - 1
            self.pairs = [(k[:, max(0, k.shape[1] - kept) :], v[:, max(0, v.shape[1] - kept) :]) for k, v in self.pairs]


class StackCache:
    """Rotated keys and values for B rows, in buffers of fixed size for a window, of doubling size without one.

    With a window of W the buffers are rings of W places: a position takes the place of the one that left the window.
    """

    def __init__(
        self, config: TransformerConfig, num_rows: int, like: Tensor, first_columns: int = FIRST_COLUMNS, spare: int = 0
    ) -> None:
        """`spare`: places behind those of each row, for whoever reads the buffers whole."""
        self.config, self.device, self.dtype, self._spare = config, like.device, like.dtype, spare
        self.counts = [0] * num_rows
        """Positions that each row has read; the place of the next is this, modulo the ring."""
        self.positions = [0] * num_rows
        """Rotary position of each row's next place."""
        self._columns = config.window or first_columns
        self._pairs = self._buffers(num_rows)
        """Of each layer, keys and values [2,B,H,C,K]."""
        self._head_places = self._places_of_heads()
        self._rotations = self._table(first_columns)

    def load(self, row: int, reader: RowReader) -> None:
        """Take over a row that was read in chunks."""
        held = reader.pairs[0][0].shape[1] if reader.pairs else 0
        kept = min(held, self.config.window or held)
        self.counts[row], self.positions[row] = kept, reader.position
        self._reserve()
        turn = self._rotations[None, reader.position - kept : reader.position, None]
        for (keys, values), (k, v) in zip(self._pairs, reader.pairs, strict=bool(reader.pairs)):
            keys[row, :, :kept] = rotate(k[:, held - kept :], turn)[0].transpose(0, 1)
            values[row, :, :kept] = v[0, held - kept :].transpose(0, 1)

    def clear(self, row: int) -> None:
        """Forget a row's positions: the next one is its first."""
        self.counts[row], self.positions[row] = 0, 0

    def rebase(self, row: int, position: int) -> None:
        """Let a row's next place have this rotary position, and the places before it the positions before that."""
        held = min(self.counts[row], self._columns)
        old = torch.arange(self.positions[row] - held, self.positions[row], device=self.device)
        # A place that falls before position 0 is the one that the next position takes over.
        new = (old + (position - self.positions[row])).clamp(min=0)
        places = torch.arange(self.counts[row] - held, self.counts[row], device=self.device) % self._columns
        turned_back, turned = self._rotations[old][:, None].conj(), self._rotations[new][:, None]
        for keys, _ in self._pairs:
            # The table's own angles undo themselves; float32 angles of the difference would be other ones.
            unrotated = rotate(keys[row].transpose(0, 1)[places], turned_back)
            keys[row].transpose(0, 1)[places] = rotate(unrotated, turned)
        self.positions[row] = position

    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows remain, in this order."""
        self.counts = [self.counts[row] for row in rows]
        self.positions = [self.positions[row] for row in rows]
        index = torch.tensor(rows, device=self.device)
        self._pairs = [pairs[:, index] for pairs in self._pairs]
        self._head_places = self._places_of_heads()

    def step(self, rows: Sequence[int] | None = None) -> "CacheStep":
        """The memory of one more position in each of these rows (distinct; all if None), which it counts as read."""
        chosen = range(len(self.counts)) if rows is None else rows
        self._reserve()
        heads = self.config.num_kv_heads
        stride = self._columns + self._spare
        first = [row * heads * stride + self.counts[row] % self._columns for row in chosen]
        first_R, position_R = torch.tensor([first, [self.positions[row] for row in chosen]], device=self.device)
        for row in chosen:
            self.counts[row] += 1
            self.positions[row] += 1
        return CacheStep(
            pairs=self._pairs,
            written_at=(first_R[:, None] + self._head_places).flatten(),
            rotations_R1NC=self._turns_of_heads(self._rotations[position_R]),
            groups=self._groups(chosen),
        )

    def _turns_of_heads(self, turns_RC: Tensor) -> Tensor:
        """What the heads of a merged projection are multiplied with, complex [R,1,N,C]: queries are scaled too, and
        values stay."""
        turns_R1C, kv_heads = turns_RC[:, None], self.config.num_kv_heads
        queries_R1C = turns_R1C * self.config.head_width**-0.5
        parts = (queries_R1C.expand(-1, self.config.heads, -1), turns_R1C.expand(-1, kv_heads, -1))
        return torch.cat((*parts, torch.ones_like(turns_R1C).expand(-1, kv_heads, -1)), 1)[:, None]

    def _groups(self, chosen: Sequence[int]) -> list["Group"]:
        """All rows at once, the places that a row has not filled masked; of some rows each for itself, uncopied."""
        filled = [min(self.counts[row], self._columns) for row in chosen]
        if len(filled) < len(self.counts):
            return [Group(slice(i, i + 1), slice(row, row + 1), filled[i], None) for i, row in enumerate(chosen)]
        columns, mask = max(filled), None
        if min(filled) < columns:
            hidden = torch.arange(columns, device=self.device) >= torch.tensor(filled, device=self.device)[:, None]
            mask = torch.zeros(hidden.shape, device=self.device, dtype=self.dtype).masked_fill_(hidden, -torch.inf)
            mask = mask.repeat_interleave(self.config.num_kv_heads, 0)[:, None]
        return [Group(slice(None), slice(None), columns, mask)]

    def _reserve(self, more: int = 1) -> None:
        """Room for more positions in every row, in the rotations and, without a window, for one in the buffers."""
        if max(self.positions) + more > len(self._rotations):
            self._rotations = self._table(2 * (max(self.positions) + more))
        if self.config.window is None and max(self.counts) >= self._columns:
            before, held = self._pairs, self._columns
            self._columns = 2 * max(self.counts)
            self._pairs = self._buffers(len(self.counts))
            for old, new in zip(before, self._pairs, strict=True):
                new[:, :, :, :held] = old[:, :, :, :held]
            self._head_places = self._places_of_heads()

    def _buffers(self, num_rows: int) -> list[Tensor]:
        """Zeros [2,B,H,C,K] for each layer: what is masked must be finite."""
        shape = (2, num_rows, self.config.num_kv_heads, self._columns + self._spare, self.config.head_width)
        return [torch.zeros(shape, device=self.device, dtype=self.dtype) for _ in range(self.config.layers)]

    def _places_of_heads(self) -> Tensor:
        """First place of row 0's keys, head by head, then of its values, in a buffer seen as [2*B*H*C,K]."""
        stride = self._columns + self._spare
        heads = torch.arange(self.config.num_kv_heads, device=self.device) * stride
        return torch.cat((heads, heads + len(self.counts) * len(heads) * stride))

    def _table(self, num_positions: int) -> Tensor:
        return rotations(torch.arange(num_positions, device=self.device)[None], self.config)[0, :, 0]


@dataclass(frozen=True)
class Group:
    """Rows that attend together: which of the step's, which of the cache's, over how many places, and a mask."""

    queries: slice
    rows: slice
    columns: int
    mask_N1C: Tensor | None
    """Of each row and key head."""


@dataclass(frozen=True, kw_only=True)
class CacheStep:
    """The memory of one position (T = 1) in each of R rows of a `StackCache`."""

    pairs: Sequence[Tensor]
    written_at: Tensor
    """Index int64 [R*2*H] of the new keys and values in a buffer seen as [2*B*H*C,K]."""
    rotations_R1NC: Tensor
    """What each head is multiplied with: rotations, of queries scaled ones, of values 1."""
    groups: Sequence[Group]

    def attend(self, layer: int, qkv_BTNK: Tensor, heads: int) -> Tensor:
        pairs, turned_RNK = self.pairs[layer], rotate(qkv_BTNK, self.rotations_R1NC)[:, 0]
        pairs.view(-1, pairs.shape[-1]).index_copy_(0, self.written_at, turned_RNK[:, heads:].flatten(0, 1))
        keys, values = pairs.unbind()
        q_RHGK = turned_RNK[:, :heads].unflatten(1, (keys.shape[1], -1))
        out = [
            place_attention(
                q_RHGK[group.queries].flatten(0, 1),
                keys[group.rows, :, : group.columns].flatten(0, 1),
                values[group.rows, :, : group.columns].flatten(0, 1),
                group.mask_N1C,
            )
            for group in self.groups
        ]
        return (out[0] if len(out) == 1 else torch.cat(out)).view(len(q_RHGK), 1, heads, -1)
