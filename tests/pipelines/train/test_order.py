"""The training order: a permutation in every epoch, the same whoever computes it."""

import math
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.train.order import MixedOrder, Order, Place, Quota, micro_steps, rank_slots, sequence_id

WORLD_SIZES = (1, 2, 3, 4, 8)

ORDERS = st.builds(
    Order,
    st.lists(st.integers(0, 7), min_size=1, max_size=12).filter(any).map(tuple),
    st.tuples(st.integers(0, 5)),
    st.integers(1, 5),
)


@given(ORDERS, st.integers(0, 3))
def test_every_epoch_is_a_permutation(order: Order, epoch: int) -> None:
    first = epoch * order.epoch_length
    found = [tuple(order.place(position)) for position in range(first, first + order.epoch_length)]
    every = [(group, number) for group, count in enumerate(order.sequences) for number in range(count)]
    assert sorted(found) == every


@given(ORDERS)
def test_a_window_holds_no_more_row_groups_than_it_says(order: Order) -> None:
    """Between two row groups of a position's window and the next there are never more than 2 R at hand."""
    groups = [order.place(position).row_group for position in range(order.epoch_length)]
    seen_last = {group: place for place, group in enumerate(groups)}
    seen_first = {group: groups.index(group) for group in seen_last}
    for place in range(len(groups)):
        open_groups = [group for group in seen_last if seen_first[group] <= place <= seen_last[group]]
        assert len(open_groups) <= order.window


def test_epochs_seeds_and_neighbours_differ() -> None:
    def order_of(seed: int, epoch: int) -> list[tuple[int, int]]:
        order = Order((20,) * 10, (seed,), 4)
        return [tuple(order.place(epoch * 200 + position)) for position in range(200)]

    orders = [order_of(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(orders[i] != orders[j] for i in range(4) for j in range(i))
    assert order_of(0, 1) == orders[1]
    neighbours = sum(a[0] == b[0] and b[1] == a[1] + 1 for a, b in pairwise(orders[0]))
    assert neighbours < 20, "sequences that follow each other in the data rarely do so in the order"


@pytest.mark.parametrize("global_batch", [1, 2, 3, 5, 8, 12, 16, 31])
@pytest.mark.parametrize("micro_batch", [1, 2, 3, 8])
def test_ranks_share_out_the_slots_in_equal_micro_steps(global_batch: int, micro_batch: int) -> None:
    for world_size in WORLD_SIZES:
        shares = [rank_slots(global_batch, rank, world_size) for rank in range(world_size)]
        assert [slot for share in shares for slot in share] == list(range(global_batch))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        steps = micro_steps(global_batch, micro_batch, world_size)
        assert (steps - 1) * micro_batch < max(map(len, shares)) <= steps * micro_batch


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=9), st.integers(0, 10**15))
def test_a_quota_gives_every_position_to_one_part_without_gaps(weights: list[int], start: int) -> None:
    quota = Quota(weights)
    found = [quota.find(position) for position in range(start, start + 200)]
    for part in range(len(weights)):
        numbers = [number for one, number in found if one == part]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers))) if numbers else True
    assert {part for part, _ in found} <= set(range(len(weights)))


@given(st.lists(st.integers(1, 50), min_size=1, max_size=9), st.integers(1, 3000))
def test_parts_stay_near_their_share(weights: list[int], positions: int) -> None:
    quota, counts = Quota(weights), [0] * len(weights)
    for position in range(positions):
        counts[quota.find(position)[0]] += 1
    allowed = math.log2(len(weights)) + 1
    assert all(
        abs(count - positions * weight / sum(weights)) <= allowed for count, weight in zip(counts, weights, strict=True)
    )


def mixed(weights: dict[str, float] | None) -> MixedOrder:
    """Source a has 3 + 5 sequences, b has 40 in one row group; c is empty."""
    return MixedOrder([3, 40, 5, 0], ["a", "b", "a", "c"], seed=1, window=2, weights=weights)


def test_sources_without_weights_come_in_proportion_to_their_size() -> None:
    found = [mixed(None).place(position) for position in range(48)]
    assert sorted(found) == [Place(g, n) for g, count in ((0, 3), (1, 40), (2, 5)) for n in range(count)]


@pytest.mark.parametrize("scale", [1e-9, 0.1, 1.0, 1e12])
def test_weights_count_in_proportion_alone(scale: float) -> None:
    weights = {"large": 3 * scale, "rare": 1e-3 * scale, "small": 1 * scale}
    order = MixedOrder([5, 7, 9], ["large", "small", "rare"], seed=0, window=2, weights=weights)
    found = Counter(order.place(position).row_group for position in range(40_010))
    assert abs(found[2] - 10) <= 3
    assert abs(found[0] - 3 * found[1]) <= 9


def test_each_source_is_a_permutation_in_every_epoch_of_its_own() -> None:
    order = mixed({"a": 1.5, "b": 0.5})
    of_a = [place for place in map(order.place, range(64)) if place.row_group != 1]
    assert len(of_a) == 48
    for epoch in range(6):
        assert sorted(of_a[8 * epoch : 8 * epoch + 8]) == [Place(g, n) for g, c in ((0, 3), (2, 5)) for n in range(c)]


def test_a_source_has_the_same_order_whatever_is_mixed_with_it() -> None:
    alone = [mixed({"b": 1.0}).place(position) for position in range(30)]
    beside = [place for place in map(mixed({"a": 1.0, "b": 2.0}).place, range(100)) if place.row_group == 1]
    assert beside[:30] == alone


def test_the_id_of_a_sequence_names_position_and_place() -> None:
    ids = {sequence_id(p, Place(g, n)) for p in range(5) for g in range(5) for n in range(5)}
    assert len(ids) == 125
    assert all(0 <= one < 2**64 for one in ids)


def test_a_hundred_thousand_row_groups_are_no_burden() -> None:
    order = MixedOrder([7] * 100_000, [f"s{i % 20}" for i in range(100_000)], seed=0, window=8)
    assert len({order.place(position) for position in range(0, 700_000, 997)}) == len(range(0, 700_000, 997))
