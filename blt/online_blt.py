"""A BLT that reads documents still being written: one more byte of each in, logits of the byte after it out.

In: byte ids, and whether the byte to come starts a patch (`blt.online_patches`). Out: logits equal to those of
`BLT.forward` on the whole prefix up to rounding. `open` reads a prompt in chunks of whole patches, as a forward does;
`step` reads one byte of every document, and the latent transformer moves only for those whose patch ends with it.
Shapes: B documents, R of them whose patch ends, T ids, n bytes, L states of a byte that patches read, k slots, D width.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from blt.decoding_cache import RowReader, StackCache
from blt.hash_embedding import HashWindows
from blt.model import BLT
from blt.segments import gather_rows
from blt.step_blocks import blt_for_steps

CHUNK_BYTES = 4096
"""A prompt is read in chunks of about this many bytes, which bounds the memory that it takes."""


class OnlineBLT:
    """What a model has to remember of documents."""

    def __init__(self, model: BLT, num_documents: int, cache_type: type[StackCache] = StackCache) -> None:
        self.model, self._steps, config = model, blt_for_steps(model), model.config
        like = model.local_decoder.output.weight
        self.device = like.device
        self._encoder = cache_type(config.local_encoder, num_documents, like)
        self._latent = cache_type(config.latent, num_documents, like)
        self._decoder = cache_type(config.local_decoder, num_documents, like)
        hashes = model.local_encoder.hash_embedding
        self._hashes = None if hashes is None else HashWindows(hashes, num_documents)
        self._open: list[list[Tensor]] = [[] for _ in range(num_documents)]
        """States [n,L,D] of the bytes of the patch that each document is in, in pieces."""
        self._readings: list[Tensor] = []
        """What a byte of each document reads of its newest complete patch, by layer: [B,k,2D] or [B,D]."""

    def open(self, document: int, ids_T: Tensor, starts: Tensor) -> Tensor:
        """Logits [V] after the first ids of a document; starts: bool [T + 1], the byte to come included.

        The first id has to be a patch of its own.
        """
        reader = PromptReader(self.model, ids_T.to(self.device))
        edges = [0, *_chunk_ends(starts, CHUNK_BYTES)]
        for first, end in pairwise(edges):
            h_BTD = reader.read(first, starts[first : end + 1].to(self.device))
        for cache, rows in zip((self._encoder, self._latent, self._decoder), reader.rows, strict=True):
            cache.load(document, rows)
        if self._hashes is not None:
            self._hashes.load(document, ids_T)
        self._open[document] = [reader.open_states]
        if not self._readings:
            self._readings = [of.new_zeros(len(self._open), *of.shape[1:]) for of in reader.readings]
        for readings, of in zip(self._readings, reader.readings, strict=True):
            readings[document] = of[-1]
        return self.model.local_decoder.logits(h_BTD[:, -1:])[0, 0]

    def step(self, ids: Sequence[int], starts: Sequence[bool]) -> Tensor:
        """Logits [B,V] after one more byte (its id) of each document; starts: whether the next opens a patch."""
        state_B1D = self._read(ids)
        ended = [document for document, start in enumerate(starts) if start]
        if ended:
            self._end_patches(ended)
        return self._decode(state_B1D)

    def keep(self, documents: Sequence[int]) -> None:
        """Only these documents go on, in this order."""
        for part in (self._encoder, self._latent, self._decoder, self._hashes):
            if part is not None:
                part.keep(documents)
        self._open = [self._open[document] for document in documents]
        index = torch.tensor(documents, device=self.device)
        self._readings = [readings[index] for readings in self._readings]

    def _read(self, ids: Sequence[int]) -> Tensor:
        """Encoder states [B,1,D] of one more byte of each document."""
        encoder, ids_B = self._steps.local_encoder, torch.tensor(ids, device=self.device)
        h_BD = encoder.byte_embedding(ids_B)
        if self._hashes is not None:
            h_BD = h_BD + self._hashes.step(ids_B)
        states = encoder.byte_states(h_BD[:, None], self._encoder.step())
        for pieces, piece in zip(self._open, torch.stack(states, 2).unbind(), strict=True):
            pieces.append(piece)
        return states[-1]

    def _decode(self, state_B1D: Tensor) -> Tensor:
        """Logits [B,V] after the byte that was read last, given its encoder state."""
        decoder = self._steps.local_decoder
        h_BTD = decoder.byte_states(state_B1D, self._readings.__getitem__, self._decoder.step())
        return decoder.logits(h_BTD)[:, 0]

    def _end_patches(self, documents: Sequence[int]) -> None:
        """Read the patches that these documents are in with the latent transformer, and begin new ones."""
        decoder = self._steps.local_decoder
        patches = [torch.cat(self._open[document]) for document in documents]
        lengths = torch.tensor([len(patch) for patch in patches], device=self.device)
        patch_N = torch.arange(len(patches), device=self.device).repeat_interleave(lengths)
        states = torch.cat(patches)[None].unbind(2)
        slots_BRkD = self._steps.local_encoder.patch_slots(states, patch_N, len(patches))
        memory = self._latent.step(documents)
        vectors = decoder.project(self._steps.latent(slots_BRkD[0].flatten(-2)[:, None], memory))
        index_R = torch.tensor(documents, device=self.device)
        for layer, readings in enumerate(self._readings):
            readings.index_copy_(0, index_R, decoder.reading(vectors, layer))
        for document in documents:
            self._open[document] = []


class PromptReader:
    """One document's first bytes, read as a forward reads them, chunk by chunk."""

    def __init__(self, model: BLT, ids_T: Tensor) -> None:
        self.model, self.ids_T = model, ids_T
        config = model.config
        self.rows = (RowReader(config.local_encoder), RowReader(config.latent), RowReader(config.local_decoder))
        """Of the encoder, the latent transformer and the decoder."""
        self.open_states = ids_T.new_empty(0)
        """States [n,L,D] of the bytes of the patch that the chunk ends in; n = 0 where it ends with a patch."""
        self.readings: list[Tensor] = []
        """By layer, what bytes read of the patches of the chunk; the last entry is the newest complete patch."""

    def read(self, first: int, starts: Tensor) -> Tensor:
        """Decoder states [1,n,D] of the n bytes from `first` on, which opens a patch; starts: bool [n + 1]."""
        encoder, decoder = self.model.local_encoder, self.model.local_decoder
        (over_bytes, over_patches, over_decoder_bytes), n = self.rows, len(starts) - 1
        begin = max(0, first - encoder.hash_reach)
        h_BTD = encoder.embed(self.ids_T[None, begin : first + n])[:, first - begin :]
        states = encoder.byte_states(h_BTD, over_bytes.chunk(n, self.ids_T.device))
        started = starts.cumsum(0)
        num_complete = int(started[-1]) - 1
        whole = int((started[:-1] <= num_complete).sum())
        self.open_states = torch.stack(states, 2)[0, whole:]
        before = [of[-1:] for of in self.readings]
        if num_complete > 0:
            slots = encoder.patch_slots([h[:, :whole] for h in states], started[:whole] - 1, num_complete)
            memory = over_patches.chunk(num_complete, self.ids_T.device)
            vectors = decoder.project(self.model.latent(slots.flatten(-2), memory))
            made = [decoder.reading(vectors, layer) for layer in range(decoder.num_readings)]
            before = [torch.cat(pair) for pair in zip(before, made, strict=True)] if before else made
        self.readings = before
        # A byte reads the patch before that of the next byte; that of an earlier chunk stands before this chunk's.
        patch_T = started[1:] - (2 if first == 0 else 1)
        return decoder.byte_states(
            states[-1],
            lambda layer: gather_rows(self.readings[layer], patch_T),
            over_decoder_bytes.chunk(n, self.ids_T.device),
        )


def _chunk_ends(starts: Tensor, size: int) -> Iterator[int]:
    """Ends of consecutive chunks of whole patches, of at most `size` bytes where patches allow; the last is T."""
    length = len(starts) - 1
    first = end = 0
    for start in [*starts[:length].nonzero().flatten().tolist(), length]:
        if start - first > size and end > first:
            yield end
            first = end
        end = start
    yield length
