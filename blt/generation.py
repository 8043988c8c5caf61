"""Generation: a language model and a prompt in, the bytes that follow out, as a whole or as they are found.

A prompt opens a document: BOS goes before it, and its patches are found byte by byte by the rule that the model was
trained with (`blt.online_patches`), equal to those of the whole text patched offline; `blt.decoder` has the logits of
the byte after each. A byte costs the same wherever it stands, but for the latent transformer's attention to all patches
before it; the latent transformer sets no limit to the length.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from blt.checkpoint import LanguageModel
from blt.decoder import Decoder
from blt.errors import ConfigError
from blt.sampling import Sampling, next_ids
from blt.speculation import SpeculativeDecoder
from blt.vocabulary import BYTE_OFFSET, EOS


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Bytes of a continuation that follow each other, as they were found; never empty."""

    data: bytes
    starts: tuple[bool, ...]
    """For each byte, whether it starts a patch."""


def generate(
    lm: LanguageModel,
    prompts: bytes | Sequence[bytes],
    *,
    max_new_bytes: int = 256,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | Sequence[int] | None = None,
    stop: bytes | Sequence[bytes] = (),
    speculate: bool = False,
) -> bytes | list[bytes]:
    """The continuation of a prompt, or the list of those of several, without the prompt.

    It ends at EOS, before the first stop string that is found in it, or after `max_new_bytes`, the bytes of a stop
    string counted. Temperature 0 is greedy; other draws use `top_k`, then `top_p`, and `seed`. Every prompt has its own
    draws, from the same seed or from one for each prompt, so its continuation is that of a call of its own, whatever
    the other prompts are (up to the first byte that rounding decides: sums of several rows round otherwise than those
    of one); several samples of one prompt take several seeds. A prompt may be empty. Neither prompt nor output need be
    valid UTF-8. `speculate` reads one prompt's document ahead (`blt.speculation`): the same bytes, at another speed.

    Raises ConfigError for an argument out of range, a prompt or stop string that is not bytes, seeds that are not as
    many as the prompts, a rule of kind top_k (it looks ahead), a rule that reads entropies where `lm` has no entropy
    model, and `speculate` for several prompts or a rule that reads no entropies.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    single = isinstance(prompts, bytes | bytearray | memoryview)
    checked = [_checked_bytes(prompt, "prompts") for prompt in ([prompts] if single else prompts)]
    seeds = [seed] * len(checked) if seed is None or isinstance(seed, int) else seed
    found = [b""] * len(checked)
    pieces = continuations(
        lm, checked, max_new_bytes=max_new_bytes, sampling=sampling, seeds=seeds, stop=stop, speculate=speculate
    )
    for document, piece in pieces:
        found[document] += piece.data
    return found[0] if single else found


def stream(
    lm: LanguageModel,
    prompt: bytes,
    *,
    max_new_bytes: int = 256,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop: bytes | Sequence[bytes] = (),
    speculate: bool = False,
) -> Iterator[bytes]:
    """The continuation of one prompt piece by piece; joined, the pieces are what `generate` returns.

    A piece is one byte, or some that were held back because they could have opened a stop string. Arguments and errors
    are those of `generate`; they are checked before the first piece is asked for.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    checked = _checked_bytes(prompt, "prompt")
    found = continuations(
        lm, [checked], max_new_bytes=max_new_bytes, sampling=sampling, seeds=[seed], stop=stop, speculate=speculate
    )
    return (piece.data for _, piece in found)


def continuations(
    lm: LanguageModel,
    prompts: Sequence[bytes],
    *,
    max_new_bytes: int,
    sampling: Sampling,
    seeds: Sequence[int | None] | None = None,
    stop: bytes | Sequence[bytes] = (),
    speculate: bool = False,
) -> Iterator[tuple[int, Piece]]:
    """What `generate` returns as it is found, with its patch starts: pieces, each with the index of its prompt.

    seeds: one for each prompt; None: that of `sampling` for all. Errors are those of `generate`, and come before the
    first piece is asked for.
    """
    stops = _stop_strings(stop)
    checked = [_checked_bytes(prompt, "prompts") for prompt in prompts]
    if max_new_bytes < 0:
        raise ConfigError(f"max_new_bytes must be at least 0, got {max_new_bytes}")
    seeds = [sampling.seed] * len(checked) if seeds is None else seeds
    if len(seeds) != len(checked):
        raise ConfigError(f"seed must be one number, or one for each of {len(checked)} prompts, got {len(seeds)}")
    if speculate and len(checked) != 1:
        raise ConfigError(f"speculate reads one document ahead, got {len(checked)} prompts")
    decoder = SpeculativeDecoder(lm) if speculate else Decoder(lm, len(checked))
    return _pieces(decoder, checked, max_new_bytes, sampling, seeds, stops)


def _pieces(
    decoder: Decoder,
    prompts: Sequence[bytes],
    max_new_bytes: int,
    sampling: Sampling,
    seeds: Sequence[int | None],
    stops: Sequence[bytes],
) -> Iterator[tuple[int, Piece]]:
    """Pieces of the continuations as they are found, each with the index of its prompt."""
    writers = [Continuation(stops, replace(sampling, seed=seed).generator()) for seed in seeds]
    going, ids = list(range(len(prompts))), list[int]()
    for num_bytes in range(max_new_bytes if prompts else 0):
        logits_BV = decoder.open(prompts) if num_bytes == 0 else decoder.step(ids)
        ids = next_ids(logits_BV, sampling, [writers[document].generator for document in going])
        for document, byte_id, starts in zip(going, ids, decoder.starts, strict=True):
            if (piece := writers[document].add(byte_id, starts)) is not None:
                yield document, piece
        rows = [row for row, document in enumerate(going) if not writers[document].ended]
        if not rows:
            break
        if len(rows) < len(going):
            decoder.keep(rows)
            going, ids = [going[row] for row in rows], [ids[row] for row in rows]
    for document in going:
        if (piece := writers[document].end()) is not None:
            yield document, piece


class Continuation:
    """What follows one prompt; bytes that may open a stop string are held back until that is known."""

    def __init__(self, stops: Sequence[bytes], generator: torch.Generator) -> None:
        self.stops, self.generator = stops, generator
        self.ended = False
        self._held, self._starts = b"", list[bool]()

    def add(self, byte_id: int, starts: bool) -> Piece | None:
        """The bytes that are now known to be part of the continuation; `starts`: whether the new one starts a patch."""
        if byte_id == EOS:
            return self.end()
        self._held += bytes([byte_id - BYTE_OFFSET])
        self._starts.append(starts)
        found = [len(string) for string in self.stops if self._held.endswith(string)]
        if found:
            return self.end(max(found))
        return self._take(len(self._held) - _opening_length(self._held, self.stops))

    def end(self, num_dropped: int = 0) -> Piece | None:
        """All that is held but its last bytes."""
        piece = self._take(len(self._held) - num_dropped)
        self._held, self._starts, self.ended = b"", [], True
        return piece

    def _take(self, num_bytes: int) -> Piece | None:
        """The first bytes of what is held; None for no bytes."""
        if num_bytes == 0:
            return None
        piece = Piece(data=self._held[:num_bytes], starts=tuple(self._starts[:num_bytes]))
        self._held, self._starts = self._held[num_bytes:], self._starts[num_bytes:]
        return piece


def _opening_length(held: bytes, stops: Sequence[bytes]) -> int:
    """Length of the longest end of `held` that opens a stop string."""
    longest = max((len(string) - 1 for string in stops), default=0)
    for length in range(min(longest, len(held)), 0, -1):
        if any(string.startswith(held[-length:]) for string in stops):
            return length
    return 0


def _stop_strings(stop: bytes | Sequence[bytes]) -> tuple[bytes, ...]:
    strings = [stop] if isinstance(stop, bytes | bytearray | memoryview) else stop
    checked = tuple(_checked_bytes(string, "stop") for string in strings)
    if b"" in checked:
        raise ConfigError("stop must not hold an empty string")
    return checked


def _checked_bytes(value: object, name: str) -> bytes:
    if not isinstance(value, bytes | bytearray | memoryview):
        raise ConfigError(f"{name} must be bytes, got {type(value).__name__}: text has to be encoded, as UTF-8")
    return bytes(value)
