"""Noise: the five ways in which the BLT paper disturbs text to test robustness, as pure functions of text and seed.

Source: BLT (arXiv 2412.09871), section 6.1, which noises HellaSwag so. Characters are Unicode code points, and each is
disturbed on its own:

- `ant_speak`: all in upper case, with a space between every two characters.
- `drop`: each character is removed with a probability of 10 %.
- `random_case`: each character is put in upper or in lower case, with 50 % each.
- `repeat`: each character is repeated with a probability of 20 %: one to four more of it follow, each as likely. (The
  paper says "up to a maximum of four times", and no more.)
- `upper_case`: all in upper case.

Cases are Unicode's full mappings, so a character may become several (ß: SS).
"""

import hashlib
from collections.abc import Callable, Iterator
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

Noise = Literal["ant_speak", "drop", "random_case", "repeat", "upper_case"]
NOISES: tuple[Noise, ...] = get_args(Noise)

DROPPED = 0.1
REPEATED = 0.2
MOST_REPEATS = 4

_PIECE_CHARACTERS = 2**16
"""A long text is disturbed in pieces, since a list of its characters takes 50 times its bytes."""


def disturb(text: bytes, noise: Noise, seed: int, doc_id: str) -> bytes:
    """The document with that noise; the same for the same text, seed and id. ValueError unless it is UTF-8."""
    digest = hashlib.blake2b(f"{seed}\0{noise}\0{doc_id}".encode("utf-8", "surrogatepass"), digest_size=16).digest()
    random = np.random.default_rng(int.from_bytes(digest))
    characters = text.decode()
    if noise == "ant_speak":
        return " ".join(map(_spaced, _pieces(characters))).encode()
    change = _CHANGES[noise]
    return b"".join(change(piece, random).encode() for piece in _pieces(characters))


def _pieces(text: str) -> Iterator[str]:
    return (text[start : start + _PIECE_CHARACTERS] for start in range(0, len(text), _PIECE_CHARACTERS))


def _spaced(text: str) -> str:
    return " ".join(text.upper())


def _drop(text: str, random: np.random.Generator) -> str:
    kept = random.random(len(text)) >= DROPPED
    return _repeated(text, kept.astype(np.int64))


def _random_case(text: str, random: np.random.Generator) -> str:
    upper = (random.random(len(text)) < 0.5).tolist()
    return "".join(c.upper() if up else c.lower() for c, up in zip(text, upper, strict=True))


def _repeat(text: str, random: np.random.Generator) -> str:
    draws = random.random(len(text))
    more = 1 + (draws * (MOST_REPEATS / REPEATED)).astype(np.int64)
    return _repeated(text, 1 + np.where(draws < REPEATED, more, 0))


def _upper_case(text: str, random: np.random.Generator) -> str:
    return text.upper()


def _repeated(text: str, times: npt.NDArray[np.int64]) -> str:
    """Each character as many times as is said."""
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    return np.repeat(codes, times).tobytes().decode("utf-32-le")


_CHANGES: dict[Noise, Callable[[str, np.random.Generator], str]] = {
    "drop": _drop,
    "random_case": _random_case,
    "repeat": _repeat,
    "upper_case": _upper_case,
}
