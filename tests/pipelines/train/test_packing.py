"""Packing: every byte and EOS of a row group is a target once, within the limits; windows of evaluation likewise."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blt.errors import DataError
from blt.loss import NO_TARGET
from blt.vocabulary import BOS, EOS
from pipelines.train.packing import RowGroup, cut_sequences, document_windows
from tests.pipelines.train.patched import MAX_PATCH, Patched, naive_row_group, patched, patched_documents
from tests.pipelines.train.plain_feed import PlainSequence, plain_sequences, unpacked

LIMITS = st.tuples(st.integers(2, 12), st.integers(MAX_PATCH, 30))


def sequences_of(group: RowGroup, max_patches: int | None, max_bytes: int) -> list[PlainSequence]:
    return [unpacked(sequence) for sequence in cut_sequences(group, max_patches, max_bytes)]


def targets_of(sequence: PlainSequence) -> list[int]:
    return [target for target in sequence.targets if target != NO_TARGET]


def all_targets(documents: Sequence[Patched]) -> list[int]:
    """Every byte and EOS in stored order."""
    return [target for document in documents for target in document.ids[1:]]


@given(patched_documents(), st.tuples(st.none() | st.integers(2, 12), st.integers(MAX_PATCH, 30)))
def test_sequences_are_those_of_putting_in_patch_after_patch(
    documents: list[Patched], limits: tuple[int | None, int]
) -> None:
    assert sequences_of(naive_row_group(documents), *limits) == plain_sequences(documents, *limits)


@given(patched_documents(), LIMITS)
def test_every_byte_and_eos_is_a_target_once_and_bos_never(documents: list[Patched], limits: tuple[int, int]) -> None:
    found = [targets_of(sequence) for sequence in sequences_of(naive_row_group(documents), *limits)]
    assert [target for targets in found for target in targets] == all_targets(documents)
    assert all(found), "no sequence is without a target"
    assert BOS not in {target for targets in found for target in targets}


@given(patched_documents(), LIMITS)
def test_sequences_keep_within_both_limits_and_waste_nothing(documents: list[Patched], limits: tuple[int, int]) -> None:
    max_patches, max_bytes = limits
    group = naive_row_group(documents)
    for packed in cut_sequences(group, *limits):
        sequence = unpacked(packed)
        assert len(sequence.ids) - 1 <= max_bytes
        assert len(sequence.patch_lengths) <= max_patches
        assert sum(sequence.patch_lengths) == len(sequence.ids)
        if packed.end < group.borders[-1]:
            starts = [*group.patch_starts(0, len(documents)).tolist(), group.borders[-1]]
            following = starts[starts.index(packed.end) + 1] - packed.end
            is_full = len(sequence.patch_lengths) == max_patches or len(sequence.ids) + following > max_bytes + 1
            assert is_full, "the next patch would have fitted"


@given(patched_documents(), LIMITS)
def test_every_document_and_fragment_opens_with_a_one_byte_patch(
    documents: list[Patched], limits: tuple[int, int]
) -> None:
    group = naive_row_group(documents)
    every = [id_ for document in documents for id_ in document.ids]
    consumed = 0
    for packed in cut_sequences(group, *limits):
        sequence = unpacked(packed)
        opens = [place for place, id_ in enumerate(sequence.ids) if id_ == BOS or place == 0]
        borders = {sum(sequence.patch_lengths[:number]) for number in range(len(sequence.patch_lengths) + 1)}
        assert {*opens, *(place + 1 for place in opens)} <= borders
        first = consumed - (consumed not in group.borders)
        assert sequence.ids == every[first : first + len(sequence.ids)]
        consumed = first + len(sequence.ids)
    assert consumed == len(every)


@given(patched_documents(), LIMITS)
def test_patches_are_counted_where_they_hold_a_target(documents: list[Patched], limits: tuple[int, int]) -> None:
    group = naive_row_group(documents)
    for packed in (*cut_sequences(group, *limits), *cut_sequences(group, None, limits[1])):
        sequence = unpacked(packed)
        assert packed.num_patches == len(sequence.patch_lengths) - (sequence.fragments[-1] + 1)


def test_a_continuation_opens_with_the_byte_before_it() -> None:
    document = patched(b"abcdefgh", [True, False])  # ab cd ef gh, EOS
    first, second, third = sequences_of(naive_row_group([document]), 3, 100)
    assert [bytes(i - 4 for i in s.ids if i >= 4) for s in (first, second, third)] == [b"abcd", b"defgh", b"h"]
    assert [s.patch_lengths for s in (first, second, third)] == [[1, 2, 2], [1, 2, 2], [1, 1]]
    assert targets_of(third) == [EOS]


def test_without_a_limit_on_patches_only_bytes_count() -> None:
    group = naive_row_group([patched(bytes(100), [True])])
    assert [len(s.ids) for s in sequences_of(group, None, 50)] == [51, 51, 2]


@pytest.mark.parametrize("text", [b"abcdef", b"a" * 200 + b"bcdef"])
@pytest.mark.parametrize("cut", [cut_sequences, document_windows])
def test_a_patch_longer_than_a_sequence_is_an_error(cut: object, text: bytes) -> None:
    assert callable(cut)
    starts = [len(text) - place > 6 for place in range(len(text))]  # single bytes, then the last six
    with pytest.raises(DataError, match="a patch of 6 bytes does not fit a sequence of 5 bytes"):
        list(cut(naive_row_group([patched(text, starts), patched(b"a", [True])]), 8, 5))


def test_sequences_are_cut_as_they_are_asked_for() -> None:
    """So that the first batch of a run that goes on does not wait for a whole row group, here not even for an error."""
    document = Patched(bytes(100), (True,) * 90 + (False,) * 10 + (True,))
    sequences = cut_sequences(naive_row_group([document]), 4, 8)
    assert [next(sequences).end for _ in range(3)] == [4, 7, 10]
    with pytest.raises(DataError):
        list(sequences)


@given(patched_documents(max_bytes=60), LIMITS)
def test_windows_score_every_target_once_each_document_apart(documents: list[Patched], limits: tuple[int, int]) -> None:
    found: list[int] = []
    for window in document_windows(naive_row_group(documents), *limits):
        sequence = unpacked(window)
        assert len(sequence.ids) - 1 <= limits[1]
        assert len(sequence.patch_lengths) <= limits[0]
        assert set(sequence.fragments) == {0}
        targets = targets_of(sequence)
        assert len(targets) == len(sequence.ids) - sequence.context > 0
        found += targets
    assert found == all_targets(documents)


def test_a_document_that_fits_is_one_window() -> None:
    group = naive_row_group([patched(bytes(20), [True, False]), patched(bytes(30), [True])])
    assert len(list(document_windows(group, 64, 64))) == 2


def test_windows_carry_about_half_of_their_bytes_over() -> None:
    group = naive_row_group([patched(bytes(1000), [True])])
    context = [window.context for window in document_windows(group, 1000, 64)]
    assert context[0] == 1  # BOS
    assert set(context[1:]) == {33}  # half of 64, and the byte that opens the fragment
    by_patches = [window.context for window in document_windows(group, 64, 1000)]
    assert set(by_patches[1:]) == {32}


def test_context_gives_way_to_a_patch_that_needs_the_window() -> None:
    document = patched(bytes(60), [False], max_patch=6)  # patches of 6 bytes in windows of 8
    windows = list(document_windows(naive_row_group([document]), 8, 8))
    assert sum(len(window) - window.context for window in windows) == 61
    assert all(len(window) <= 9 for window in windows)
