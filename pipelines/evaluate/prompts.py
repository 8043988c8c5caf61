"""Prompts: beginnings of documents that are evaluated; which ones, a seed decides, whatever order they come in."""

import hashlib
import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pipelines.evaluate.utf8 import check_utf8


@dataclass(frozen=True, kw_only=True, order=True)
class Prompt:
    """The beginning of a document."""

    key: bytes
    """By which documents are chosen: a hash of the seed and the whole text."""
    text: bytes
    """Valid UTF-8."""


def prompts_of(texts: Iterable[bytes], prefix_bytes: int, seed: int) -> Iterator[Prompt]:
    """The beginning of each document of at least two bytes that begins as UTF-8: `prefix_bytes`, or half of a shorter
    document, less what cuts a character."""
    for text in texts:
        prefix = text[: min(prefix_bytes, len(text) // 2)]
        while (found := check_utf8(prefix)).cut and prefix:
            prefix = prefix[:-1]
        if prefix and not found.invalid_sequences:
            yield Prompt(key=hashlib.blake2b(b"%d\0" % seed + text, digest_size=16).digest(), text=prefix)


def choose(prompts: Iterable[Prompt], count: int) -> list[Prompt]:
    """Those of the smallest keys, each once; fewer if there are not as many."""
    return heapq.nsmallest(count, set(prompts))
