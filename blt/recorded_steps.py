"""One more byte of each document by kernels that are recorded once and replayed: generation on CUDA.

A step starts some hundreds of small kernels, which takes the driver far longer than they run; a CUDA graph starts all
of them at once. So shapes are fixed, nothing waits for the device, and what differs from step to step (ids, places,
lengths, who takes part) comes in as one tensor of numbers: a row that takes no part writes to a spare place that is
never read. Documents, prompts and results are those of `OnlineBLT` and `OnlineEntropies`.
On other devices the same functions run unrecorded, which only tests do.
Shapes: B rows, M bytes of an open patch, L states of a byte that patches read, D width, V vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from blt.decoding_cache import CacheStep, Group, StackCache
from blt.entropy_model import EntropyModel, next_byte_entropy
from blt.layers import TransformerConfig
from blt.model import BLT
from blt.online_blt import OnlineBLT
from blt.online_entropies import OnlineEntropies

FIRST_COLUMNS = 1024
"""Patches that a latent cache begins with, and rotations of every cache: each doubling is recorded anew."""

FIRST_PATCH_BYTES = 64
"""Bytes of an open patch that there is room for at first."""


def online_blt(model: BLT, num_documents: int) -> OnlineBLT:
    """The one for the model's device."""
    on_cuda = model.local_decoder.output.weight.is_cuda
    return RecordedBLT(model, num_documents) if on_cuda else OnlineBLT(model, num_documents)


def online_entropies(model: EntropyModel, reset_on_newline: bool, num_documents: int) -> OnlineEntropies:
    """The one for the model's device."""
    online_type = RecordedEntropies if model.output.weight.is_cuda else OnlineEntropies
    return online_type(model, reset_on_newline, num_documents)


class RecordedEntropies(OnlineEntropies):
    """`OnlineEntropies` whose step is recorded."""

    def __init__(self, model: EntropyModel, reset_on_newline: bool, num_documents: int) -> None:
        super().__init__(model, reset_on_newline, num_documents, FixedCache)
        self._rows = list(range(num_documents))
        """Row of each document."""
        self._steps_of_all = _Recorder(num_documents, 1 + FixedCache.NUMBERS, self._cache.device)

    def step(self, ids: Sequence[int]) -> Tensor:
        for row, byte_id in zip(self._rows, ids, strict=True):
            self._open_context(row, byte_id)
        cache = self._fixed_cache
        cache.reserve()
        recorder = self._steps_of_all
        replay = recorder.recorded(self._read_ids, lambda: self._numbers({}), cache.room)
        recorder.set(self._numbers(dict(zip(self._rows, ids, strict=True))))
        return replay().cpu()[self._rows]

    def keep(self, documents: Sequence[int]) -> None:
        self._rows = [self._rows[document] for document in documents]

    @property
    def _fixed_cache(self) -> "FixedCache":
        assert isinstance(self._cache, FixedCache)
        return self._cache

    def _numbers(self, ids: dict[int, int]) -> list[list[int]]:
        """What a step reads of each row, given the next ids of those that take part."""
        places = self._fixed_cache.advance(ids)
        return [[ids.get(row, 0), *place] for row, place in enumerate(places)]

    def _read_ids(self) -> Tensor:
        """Entropies [B]."""
        ids_B1, places = self._steps_of_all.numbers.split([1, FixedCache.NUMBERS], 1)
        return next_byte_entropy(self._steps.logits(ids_B1, self._fixed_cache.memory(places))[:, 0])


class RecordedBLT(OnlineBLT):
    """`OnlineBLT` whose step is recorded twice: with the end of a patch in some row, and without."""

    def __init__(self, model: BLT, num_documents: int) -> None:
        super().__init__(model, num_documents, FixedCache)
        self._rows = list(range(num_documents))
        """Row of each document."""
        self._live_R = torch.arange(num_documents, device=self.device)
        self._reach = model.local_encoder.hash_reach + 1
        self._windows = [[0] * self._reach for _ in self._rows]
        """The last ids of each row, which the next one is hashed with; itself the last of them."""
        self._sizes = [0] * num_documents
        """Bytes of the patch that each row is in."""
        self._patch_bytes = FIRST_PATCH_BYTES
        self._patch_states = torch.empty(0)
        """States [B,M + 1,L,D] of those bytes."""
        # Id window; place in the patch, bytes of the patch; encoder, decoder, latent transformer.
        self._recorder = _Recorder(num_documents, self._reach + 2 + 3 * FixedCache.NUMBERS, self.device)

    def open(self, document: int, ids_T: Tensor, starts: Tensor) -> Tensor:
        logits_V = super().open(document, ids_T, starts)
        row = self._rows[document]
        assert row == document
        (states_NLD,) = self._open[document]
        self._open[document] = []
        self._sizes[row] = len(states_NLD)
        self._make_room(states_NLD)
        self._patch_states[row, : len(states_NLD)] = states_NLD
        last = ids_T[-self._reach :].tolist()
        self._windows[row] = [0] * (self._reach - len(last)) + last
        return logits_V

    def step(self, ids: Sequence[int], starts: Sequence[bool]) -> Tensor:
        for row, byte_id in zip(self._rows, ids, strict=True):
            self._windows[row] = [*self._windows[row][1:], byte_id]
        ended = [row for row, start in zip(self._rows, starts, strict=True) if start]
        self._make_room(self._patch_states)
        for cache in self._caches:
            cache.reserve()
        room = (self._patch_bytes, *(cache.room for cache in self._caches))
        function = self._read_and_end_patches if ended else self._read_bytes
        replay = self._recorder.recorded(function, lambda: self._numbers([], []), room)
        self._recorder.set(self._numbers(self._rows, ended))
        for row in self._rows:
            self._sizes[row] += 1
        for row in ended:
            self._sizes[row] = 0
        return replay()[self._live_R]

    def keep(self, documents: Sequence[int]) -> None:
        self._rows = [self._rows[document] for document in documents]
        self._live_R = torch.tensor(self._rows, device=self.device)

    @property
    def _caches(self) -> "list[FixedCache]":
        caches = [self._encoder, self._decoder, self._latent]
        return [cache for cache in caches if isinstance(cache, FixedCache)]

    def _make_room(self, like: Tensor) -> None:
        """For one more byte in the patch of every row; like [..., L, D]."""
        while max(self._sizes) >= self._patch_bytes:
            self._patch_bytes *= 2
        held = self._patch_states.shape[1] - 1 if self._patch_states.ndim == 4 else 0
        if held < self._patch_bytes:
            before = self._patch_states
            # Zeros: what stands behind a patch's bytes is read and not used, and must be finite.
            self._patch_states = like.new_zeros(len(self._sizes), self._patch_bytes + 1, *like.shape[-2:])
            if held:
                self._patch_states[:, :held] = before[:, :held]

    def _numbers(self, live: Sequence[int], ended: Sequence[int]) -> list[list[int]]:
        """What a step reads of each row, given those that take part and those whose patch ends."""
        encoder, decoder, latent = self._caches
        numbers = [[*window, self._patch_bytes, 0] for window in self._windows]
        for row in live:
            numbers[row][-2] = self._sizes[row]
        for row in ended:
            numbers[row][-1] = self._sizes[row] + 1
        parts = (encoder.advance(live), decoder.advance(live), latent.advance(ended))
        return [sum(places, first) for first, *places in zip(numbers, *parts, strict=True)]

    def _read_bytes(self) -> Tensor:
        return self._logits(ends=False)

    def _read_and_end_patches(self) -> Tensor:
        return self._logits(ends=True)

    def _logits(self, ends: bool) -> Tensor:
        """Logits [B,V] after the next byte of each row."""
        width = FixedCache.NUMBERS
        window_BL, place_B1, size_B1, *places = self._recorder.numbers.split([self._reach, 1, 1, *(width,) * 3], 1)
        (encoder_cache, decoder_cache, latent_cache), model = self._caches, self._steps
        h_BD = model.local_encoder.byte_embedding(window_BL[:, -1])
        if self._hashes is not None:
            h_BD = h_BD + self._hashes.read(window_BL)
        states = model.local_encoder.byte_states(h_BD[:, None], encoder_cache.memory(places[0]))
        self._add_to_patches(place_B1[:, 0], torch.stack(states, 2)[:, 0])
        if ends:
            self._end_patches_of_rows(size_B1[:, 0], latent_cache.memory(places[2]))
        memory = decoder_cache.memory(places[1])
        h_BTD = model.local_decoder.byte_states(states[-1], self._readings.__getitem__, memory)
        return model.local_decoder.logits(h_BTD)[:, 0]

    def _add_to_patches(self, place_B: Tensor, states_BLD: Tensor) -> None:
        first_B = torch.arange(len(place_B), device=self.device) * self._patch_states.shape[1]
        self._patch_states.flatten(0, 1).index_copy_(0, first_B + place_B, states_BLD)

    def _end_patches_of_rows(self, size_B: Tensor, memory: CacheStep) -> None:
        """Read the patches of these sizes with the latent transformer; size 0: a patch that does not end."""
        num_rows, places, *_ = self._patch_states.shape
        row_B = torch.arange(num_rows, device=self.device)[:, None]
        used_BM = torch.arange(places, device=self.device) < size_B[:, None]
        patch_N = torch.where(used_BM, row_B, num_rows).flatten()  # what is not used goes into a patch of its own
        states = self._patch_states.flatten(0, 1)[None].unbind(2)
        slots_BRkD = self._steps.local_encoder.patch_slots(states, patch_N, num_rows + 1)
        decoder = self._steps.local_decoder
        vectors = decoder.project(self._steps.latent(slots_BRkD[0, :num_rows].flatten(-2)[:, None], memory))
        for layer, readings in enumerate(self._readings):
            ends = (size_B > 0).view(-1, *[1] * (readings.ndim - 1))
            readings.copy_(torch.where(ends, decoder.reading(vectors, layer), readings))


class FixedCache(StackCache):
    """A `StackCache` whose step takes places from a tensor, over all columns, with a spare one behind them."""

    NUMBERS = 3
    """Of each row: the column that is written, its rotary position, and how many columns are read."""

    def __init__(self, config: TransformerConfig, num_rows: int, like: Tensor) -> None:
        super().__init__(config, num_rows, like, FIRST_COLUMNS, spare=1)

    @property
    def room(self) -> tuple[int, int]:
        """What a recorded step holds on to: columns and rotations."""
        return self._columns, len(self._rotations)

    def reserve(self) -> None:
        """Room for one more position in every row."""
        self._reserve()

    def advance(self, rows: Sequence[int] | dict[int, int]) -> list[list[int]]:
        """The numbers of each row for one more position in these rows, which it counts as read."""
        numbers = [[self._columns, 0, 1] for _ in self.counts]
        for row in rows:
            filled = min(self.counts[row] + 1, self._columns)
            numbers[row] = [self.counts[row] % self._columns, self.positions[row], filled]
            self.counts[row] += 1
            self.positions[row] += 1
        return numbers

    def memory(self, numbers_BN: Tensor) -> CacheStep:
        """The memory of one position in each row, at places that the numbers give when it is read."""
        column_B, position_B, filled_B = numbers_BN.unbind(1)
        heads, columns = self.config.num_kv_heads, self._columns + self._spare
        first_B = torch.arange(len(column_B), device=self.device) * heads * columns + column_B
        hidden_BC = torch.arange(columns, device=self.device) >= filled_B[:, None]
        mask_BC = torch.zeros(hidden_BC.shape, device=self.device, dtype=self.dtype).masked_fill_(hidden_BC, -torch.inf)
        mask_N1C = mask_BC.repeat_interleave(heads, 0)[:, None]
        return CacheStep(
            pairs=self._pairs,
            written_at=(first_B[:, None] + self._head_places).flatten(),
            rotations_R1NC=self._turns_of_heads(self._rotations[position_B]),
            groups=[Group(slice(None), slice(None), columns, mask_N1C)],
        )


class _Recorder:
    """Functions of one tensor of numbers, each recorded at its first use and when the room that it uses changes."""

    def __init__(self, num_rows: int, width: int, device: torch.device) -> None:
        self.numbers = torch.zeros(num_rows, width, dtype=torch.int64, device=device)
        self._replays: dict[str, Callable[[], Tensor]] = {}
        self._room: object = None

    def set(self, numbers: list[list[int]]) -> None:
        self.numbers.copy_(torch.tensor(numbers), non_blocking=True)

    def recorded(
        self, function: Callable[[], Tensor], idle: Callable[[], list[list[int]]], room: object
    ) -> Callable[[], Tensor]:
        """What gives the function's result for the numbers that are set then: on CUDA a tensor that the next call
        overwrites. `idle` gives numbers with which it changes nothing that is read."""
        if self._room != room:
            self._replays.clear()
            self._room = room
        if function.__name__ not in self._replays:
            self.set(idle())
            self._replays[function.__name__] = _record(function) if self.numbers.is_cuda else function
        return self._replays[function.__name__]


def _record(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A function whose kernels are started at once, as one graph. It runs once before, unrecorded, as libraries take
    their workspaces then."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        function()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay
