"""Packing: every byte and EOS of a row group is a target once, within the limits; windows of evaluation likewise."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blt.errors import DataError
from blt.loss import NO_TARGET
from blt.vocabulary import BOS, EOS
from pipelines.train.batch import make_batch
from pipelines.train.packing import PackedSequence, RowGroup, cut_sequences, document_windows, take_sequence
from tests.pipelines.train.patched import MAX_PATCH, Patched, naive_row_group, patched, patched_documents

LIMITS = st.tuples(st.integers(2, 12), st.integers(MAX_PATCH, 30))


def sequences_of(group: RowGroup, max_patches: int | None, max_bytes: int) -> list[PackedSequence]:
    cuts = cut_sequences(group, max_patches, max_bytes).tolist()
    return [take_sequence(group, first, end) for first, end in itertools.pairwise(cuts)]


def targets_of(sequence: PackedSequence) -> list[int]:
    targets = make_batch([sequence], with_patches=True).targets_BT
    return [int(target) for target in targets[targets != NO_TARGET]]


def all_targets(documents: Sequence[Patched]) -> list[int]:
    """Every byte and EOS in stored order."""
    return [target for document in documents for target in document.ids[1:]]


@given(patched_documents(), LIMITS)
def test_every_byte_and_eos_is_a_target_once_and_bos_never(documents: list[Patched], limits: tuple[int, int]) -> None:
    sequences = sequences_of(naive_row_group(documents), *limits)
    found = [targets_of(sequence) for sequence in sequences]
    assert [target for targets in found for target in targets] == all_targets(documents)
    assert [len(targets) for targets in found] == [sequence.num_targets for sequence in sequences]
    assert all(found), "no sequence is without a target"
    assert BOS not in {target for targets in found for target in targets}


@given(patched_documents(), LIMITS)
def test_sequences_keep_within_both_limits_and_waste_nothing(documents: list[Patched], limits: tuple[int, int]) -> None:
    max_patches, max_bytes = limits
    group = naive_row_group(documents)
    sequences, cuts = sequences_of(group, *limits), cut_sequences(group, *limits)
    for sequence, end in zip(sequences, cuts[1:].tolist(), strict=True):
        assert len(sequence.ids_M) - 1 <= max_bytes
        assert len(sequence.patch_lengths) <= max_patches
        assert sequence.patch_lengths.sum() == len(sequence.ids_M)
        if end < len(group.patch_starts) - 1:
            following = int(group.patch_starts[end + 1] - group.patch_starts[end])
            is_full = len(sequence.patch_lengths) == max_patches or len(sequence.ids_M) + following > max_bytes + 1
            assert is_full, "the next patch would have fitted"


@given(patched_documents(), LIMITS)
def test_every_document_and_fragment_opens_with_a_one_byte_patch(
    documents: list[Patched], limits: tuple[int, int]
) -> None:
    group = naive_row_group(documents)
    consumed = 0
    for sequence in sequences_of(group, *limits):
        borders = np.concatenate(([0], np.cumsum(sequence.patch_lengths)))
        assert sequence.fragment_starts[0] == 0
        for start in sequence.fragment_starts.tolist():
            assert start in borders
            assert start + 1 in borders
        assert (sequence.ids_M[sequence.fragment_starts[1:]] == BOS).all()
        is_continuation = consumed not in group.document_starts
        first = consumed - is_continuation
        assert sequence.ids_M.tolist() == group.ids_N[first : first + len(sequence.ids_M)].tolist()
        consumed = first + len(sequence.ids_M)
    assert consumed == len(group.ids_N)


def test_a_continuation_opens_with_the_byte_before_it() -> None:
    document = patched(b"abcdefgh", [True, False])  # ab cd ef gh, EOS
    first, second, third = sequences_of(naive_row_group([document]), 3, 100)
    assert [bytes(i - 4 for i in s.ids_M if i >= 4) for s in (first, second, third)] == [b"abcd", b"defgh", b"h"]
    assert [s.patch_lengths.tolist() for s in (first, second, third)] == [[1, 2, 2], [1, 2, 2], [1, 1]]
    assert targets_of(third) == [EOS]


def test_without_a_limit_on_patches_only_bytes_count() -> None:
    group = naive_row_group([patched(bytes(100), [True])])
    assert [len(s.ids_M) for s in sequences_of(group, None, 50)] == [51, 51, 2]


@pytest.mark.parametrize("cut", [lambda group: cut_sequences(group, 8, 5), lambda group: document_windows(group, 8, 5)])
def test_a_patch_longer_than_a_sequence_is_an_error(cut: object) -> None:
    assert callable(cut)
    with pytest.raises(DataError, match="a patch of 6 bytes does not fit a sequence of 5 bytes"):
        cut(naive_row_group([patched(b"abcdef", [])]))


@pytest.mark.parametrize("documents", [[], [b""], [b"", b"", b""], [b"a"]])
def test_empty_row_groups_and_documents(documents: list[bytes]) -> None:
    group = naive_row_group([patched(text, []) for text in documents])
    sequences = sequences_of(group, 4, 8)
    assert sum(sequence.num_targets for sequence in sequences) == sum(len(text) + 1 for text in documents)
    assert len(document_windows(group, 4, 8)) == len(documents)


@given(patched_documents(max_bytes=60), LIMITS)
def test_windows_score_every_target_once_each_document_apart(documents: list[Patched], limits: tuple[int, int]) -> None:
    group = naive_row_group(documents)
    found: list[int] = []
    for window in document_windows(group, *limits):
        sequence = take_sequence(group, *window)
        assert len(sequence.ids_M) - 1 <= limits[1]
        assert len(sequence.patch_lengths) <= limits[0]
        assert len(sequence.fragment_starts) == 1
        targets = targets_of(sequence)
        assert len(targets) == sequence.num_targets > 0
        found += targets
    assert found == all_targets(documents)


def test_a_document_that_fits_is_one_window() -> None:
    group = naive_row_group([patched(bytes(20), [True, False]), patched(bytes(30), [True])])
    assert len(document_windows(group, 64, 64)) == 2


def test_windows_carry_about_half_of_their_bytes_over() -> None:
    group = naive_row_group([patched(bytes(1000), [True])])
    windows = document_windows(group, 1000, 64)
    context = [take_sequence(group, *window).context for window in windows]
    assert context[0] == 1  # BOS
    assert set(context[1:]) == {33}  # half of 64, and the byte that opens the fragment
    by_patches = [take_sequence(group, *window).context for window in document_windows(group, 64, 1000)]
    assert set(by_patches[1:]) == {32}


def test_context_gives_way_to_a_patch_that_needs_the_window() -> None:
    document = patched(bytes(60), [False], max_patch=6)  # patches of 6 bytes in windows of 8
    group = naive_row_group([document])
    windows = [take_sequence(group, *window) for window in document_windows(group, 8, 8)]
    assert sum(window.num_targets for window in windows) == 61
    assert all(len(window.ids_M) <= 9 for window in windows)
