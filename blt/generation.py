"""Generation: a language model and a prompt in, the bytes that follow out, as a whole or as they are found.

A prompt opens a document: BOS goes before it, and its patches are found byte by byte by the rule that the model was
trained with (`blt.online_patches`), equal to those of the whole text patched offline. `PrefixDecoder` turns each new
byte into the next byte's logits; it recomputes the whole prefix, so a byte costs a forward pass over all bytes before
it and n bytes cost O(n^2). The latent transformer sets no limit to the length.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from blt.checkpoint import LanguageModel
from blt.errors import ConfigError
from blt.online_patches import OnlinePatches
from blt.sampling import Sampling, next_id
from blt.vocabulary import BOS, BYTE_OFFSET, EOS, encode


def generate(
    lm: LanguageModel,
    prompts: bytes | Sequence[bytes],
    *,
    max_new_bytes: int = 256,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop: bytes | Sequence[bytes] = (),
) -> bytes | list[bytes]:
    """The continuation of a prompt, or the list of those of several, without the prompt.

    It ends at EOS, before the first stop string that is found in it, or after `max_new_bytes`, the bytes of a stop
    string counted. Temperature 0 is greedy; other draws use `top_k`, then `top_p`, and `seed`. Every prompt has its own
    draws from the same seed, so its continuation is that of a call of its own, whatever the other prompts are; several
    samples of one prompt take several seeds. A prompt may be empty. Neither prompt nor output need be valid UTF-8.

    Raises ConfigError for an argument out of range, a prompt or stop string that is not bytes, a rule of kind top_k
    (it looks ahead), and a rule that reads entropies where `lm` has no entropy model.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    stops = _stop_strings(stop)
    single = isinstance(prompts, bytes | bytearray | memoryview)
    checked = [_checked_bytes(prompt, "prompts") for prompt in ([prompts] if single else prompts)]
    _check_count(max_new_bytes)
    found = [b"".join(_continuation(PrefixDecoder(lm), p, max_new_bytes, sampling, stops)) for p in checked]
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
) -> Iterator[bytes]:
    """The continuation of one prompt piece by piece; joined, the pieces are what `generate` returns.

    A piece is one byte, or some that were held back because they could have opened a stop string. Arguments and errors
    are those of `generate`; they are checked before the first piece is asked for.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    stops = _stop_strings(stop)
    checked = _checked_bytes(prompt, "prompt")
    _check_count(max_new_bytes)
    return _continuation(PrefixDecoder(lm), checked, max_new_bytes, sampling, stops)


class PrefixDecoder:
    """One document being written: bytes in, logits of the byte after them out.

    This one keeps the bytes and their patches and computes the model anew for every call.
    """

    def __init__(self, lm: LanguageModel) -> None:
        self.model = lm.model
        self.device = next(lm.model.parameters()).device
        with torch.inference_mode():
            self.patches = OnlinePatches(lm.patch_rule, lm.entropy_model, lm.reset_on_newline)

    @torch.inference_mode()
    def feed(self, new: bytes) -> Tensor:
        """Logits [V] of the byte that follows BOS, all bytes fed before and `new` (which may be empty)."""
        self.patches.feed(new)
        ids_T = F.pad(encode(self.patches.document), (1, 0), value=BOS)
        lengths_P = self.patches.lengths()
        logits_BTV: Tensor = self.model(ids_T[None].to(self.device), lengths_P[None].to(self.device))
        return logits_BTV[0, -1]


def _continuation(
    decoder: PrefixDecoder, prompt: bytes, max_new_bytes: int, sampling: Sampling, stops: Sequence[bytes]
) -> Iterator[bytes]:
    """Pieces of the continuation; bytes that may open a stop string are held back until that is known."""
    generator, new, held = sampling.generator(), prompt, b""
    for _ in range(max_new_bytes):
        chosen = next_id(decoder.feed(new), sampling, generator)
        if chosen == EOS:
            break
        new = bytes([chosen - BYTE_OFFSET])
        held += new
        ended = [string for string in stops if held.endswith(string)]
        if ended:
            held = held[: len(held) - max(map(len, ended))]
            break
        kept = _opening_length(held, stops)
        if kept < len(held):
            yield held[: len(held) - kept]
            held = held[len(held) - kept :]
    if held:
        yield held


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


def _check_count(max_new_bytes: int) -> None:
    if max_new_bytes < 0:
        raise ConfigError(f"max_new_bytes must be at least 0, got {max_new_bytes}")
