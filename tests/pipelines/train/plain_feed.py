"""What the feed gives, made plainly: lists, an id at a time, from documents as they were written.

The implementation that tests hold the fast one to; nothing of it is shared but the vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from blt.loss import NO_TARGET
from blt.vocabulary import BOE, BOS, BYTE_OFFSET, EOS
from pipelines.train.packing import PackedSequence
from tests.pipelines.train.patched import Patched


@dataclass(frozen=True)
class PlainSequence:
    """A sequence id by id."""

    ids: list[int]
    patch_lengths: list[int]
    fragments: list[int]
    """The number of each id's document or fragment in the sequence."""
    context: int = 0

    @property
    def targets(self) -> list[int]:
        """What is to be predicted at each id but the last."""
        new = [before != after for before, after in pairwise(self.fragments)]
        read_only = [place + 1 < self.context for place in range(len(new))]
        return [
            NO_TARGET if opens or context else target
            for opens, context, target in zip(new, read_only, self.ids[1:], strict=True)
        ]


def plain_sequences(documents: Sequence[Patched], max_patches: int | None, max_bytes: int) -> list[PlainSequence]:
    """The sequences of a row group: patch after patch goes in as long as it fits."""
    sequences: list[PlainSequence] = []
    current = PlainSequence([], [], [])
    for document in documents:
        for number, patch in enumerate(_patches(document)):
            full = len(current.patch_lengths) == max_patches or len(current.ids) + len(patch) > max_bytes + 1
            if full or not sequences:
                opener = [] if number == 0 else [current.ids[-1]]
                current = PlainSequence(list(opener), [1] * len(opener), [0] * len(opener))
                sequences.append(current)
            opens = number == 0 and bool(current.ids)
            fragment = current.fragments[-1] + opens if current.ids else 0
            current.ids.extend(patch)
            current.patch_lengths.append(len(patch))
            current.fragments.extend([fragment] * len(patch))
    return sequences


def _patches(document: Patched) -> list[list[int]]:
    """BOS, then the ids from each start to the next."""
    patches: list[list[int]] = [[BOS]]
    for start, id_ in zip(document.starts, document.ids[1:], strict=True):
        if start:
            patches.append([])
        patches[-1].append(id_)
    return patches


@dataclass(frozen=True)
class PlainBatch:
    """Rows as long as the longest."""

    byte_ids: list[list[int]]
    targets: list[list[int]]
    document_ids: list[list[int]]
    patch_lengths: list[list[int]]


def plain_batch(sequences: Sequence[PlainSequence]) -> PlainBatch:
    """The batch of sequences; without any, a row of padding."""
    if not sequences:
        return PlainBatch([[BOE]], [[NO_TARGET]], [[-1]], [[1, 1]])
    size = max(len(sequence.ids) for sequence in sequences)
    most = max(len(sequence.patch_lengths) for sequence in sequences) + 1
    lengths = [[*sequence.patch_lengths, size - len(sequence.ids)] for sequence in sequences]
    return PlainBatch(
        byte_ids=[_padded(sequence.ids, size, BOE)[:-1] for sequence in sequences],
        targets=[_padded(sequence.targets, size - 1, NO_TARGET) for sequence in sequences],
        document_ids=[_padded(sequence.fragments, size, -1)[:-1] for sequence in sequences],
        patch_lengths=[_padded(row, most, 0) for row in lengths],
    )


def _padded(values: list[int], size: int, padding: int) -> list[int]:
    return values + [padding] * (size - len(values))


def unpacked(sequence: PackedSequence) -> PlainSequence:
    """A packed sequence id by id."""
    text, bos, eos = sequence.parts()
    specials = dict.fromkeys(bos, BOS) | dict.fromkeys(eos, EOS)
    values = iter(text.tolist())
    ids = [specials[place] if place in specials else next(values) + BYTE_OFFSET for place in range(len(sequence))]
    assert next(values, None) is None, "a byte that has no place"
    fragments = [sum(0 < opens <= place for opens in bos) for place in range(len(ids))]
    return PlainSequence(ids, [1, *sequence.patch_lengths.tolist()], fragments, sequence.context)
