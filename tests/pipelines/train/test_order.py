"""The training order: a permutation in every epoch, the same whoever computes it."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.train.order import Order, micro_steps, rank_slots

WORLD_SIZES = (1, 2, 3, 4, 8)

ORDERS = st.builds(
    Order,
    st.lists(st.integers(0, 7), min_size=1, max_size=12).filter(any).map(tuple),
    st.integers(0, 5),
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
        order = Order((20,) * 10, seed, 4)
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
