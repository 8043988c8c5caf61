"""The byte vocabulary: id = byte + 4, four special ids below. The only home of these constants.

In: bytes. Out: int64 ids. The released BLT checkpoints use the same ids.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

BOE = 0
"""Beginning of example; doubles as padding id."""
BOS = 1
"""Beginning of document."""
EOS = 2
"""End of document."""
BPE_DELIMITER = 3
"""Reserved by released checkpoints; never produced here."""
BYTE_OFFSET = 4
VOCABULARY_SIZE = 256 + BYTE_OFFSET


def encode(document: bytes) -> Tensor:
    """Ids of a document's bytes, int64 [n], without specials."""
    if not document:
        return torch.empty(0, dtype=torch.int64)
    return torch.frombuffer(bytearray(document), dtype=torch.uint8).long() + BYTE_OFFSET


def decode(ids: Iterable[int]) -> bytes:
    """Bytes of a sequence of ids; specials (ids below 4) are dropped.

    Raises ValueError for an id outside the vocabulary.
    """
    values = [int(i) for i in ids]
    for value in values:
        if not 0 <= value < VOCABULARY_SIZE:
            raise ValueError(f"byte id {value} is outside the vocabulary of {VOCABULARY_SIZE}")
    return bytes(value - BYTE_OFFSET for value in values if value >= BYTE_OFFSET)
