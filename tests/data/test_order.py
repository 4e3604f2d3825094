"""The order of rows: every row once an epoch, the same batch at any world size, and never another order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from overproof.data.order import Order, permutation

orders = st.builds(Order, groups=st.integers(1, 12), rows_per_group=st.integers(1, 9), seed=st.integers(0, 2**64 - 1))


@given(orders, st.integers(0, 5))
def test_every_row_comes_exactly_once_in_an_epoch(order: Order, epoch: int) -> None:
    ids = order.rows_at(epoch * order.rows, (epoch + 1) * order.rows)
    assert sorted(ids) == list(range(order.rows))


@given(orders, st.integers(0, 5))
def test_row_groups_stay_whole(order: Order, epoch: int) -> None:
    ids = order.rows_at(epoch * order.rows, (epoch + 1) * order.rows)
    groups = ids.reshape(order.groups, order.rows_per_group) // order.rows_per_group
    assert (groups == groups[:, :1]).all()


@given(orders, st.integers(0, 20), st.sampled_from([1, 2, 3, 4, 6]), st.integers(1, 4))
def test_a_global_batch_holds_the_same_rows_at_any_world_size(order: Order, step: int, world: int, share: int) -> None:
    batch_size = 12 * share  # may be no multiple of the row group, or hold several epochs
    parts = [order.step_rows(step, batch_size, rank, world) for rank in range(world)]
    assert {len(part) for part in parts} == {batch_size // world}
    assert np.array_equal(np.concatenate(parts), order.step_rows(step, batch_size))


@given(orders, st.integers(0, 20), st.integers(1, 9), st.sampled_from([1, 2, 3]))
def test_steps_together_are_the_steps_one_by_one(order: Order, first: int, count: int, world: int) -> None:
    for rank in range(world):
        steps = [order.step_rows(step, 6, rank, world) for step in range(first, first + count)]
        assert np.array_equal(order.steps_rows(first, first + count, 6, rank, world), np.concatenate(steps))


@given(orders, st.integers(0, 400), st.integers(0, 60), st.integers(0, 60))
def test_any_cut_of_the_order_is_the_same_order(order: Order, start: int, first: int, second: int) -> None:
    whole = order.rows_at(start, start + first + second)
    cut = [order.rows_at(start, start + first), order.rows_at(start + first, start + first + second)]
    assert np.array_equal(whole, np.concatenate(cut))


@pytest.mark.parametrize("batch_size", [3, 4, 5, 20, 47])
def test_steps_run_across_the_end_of_an_epoch(batch_size: int) -> None:
    order = Order(groups=5, rows_per_group=4, seed=7)
    steps = np.concatenate([order.step_rows(step, batch_size) for step in range(20)])
    assert np.array_equal(steps, order.rows_at(0, 20 * batch_size))
    for epoch in range(20 * batch_size // order.rows):
        assert sorted(steps[epoch * order.rows : (epoch + 1) * order.rows]) == list(range(order.rows))


def test_the_order_never_changes() -> None:
    """Golden values: a saved cursor, a teacher cache and a resumed run all depend on them."""
    order = Order(groups=5, rows_per_group=4, seed=7)
    first = [17, 19, 18, 16, 7, 6, 5, 4, 15, 14, 12, 13, 10, 8, 11, 9, 2, 1, 3, 0]
    second = [13, 14, 15, 12, 5, 7, 6, 4, 8, 10, 9, 11, 16, 19, 18, 17, 2, 0, 1, 3]
    assert order.rows_at(0, 40).tolist() == first + second
    other_seed = [19, 16, 17, 18, 13, 15, 14, 12, 4, 6, 5, 7, 11, 9, 10, 8, 0, 3, 1, 2]
    assert Order(5, 4, 8).rows_at(0, 20).tolist() == other_seed
    assert Order(1000, 16, 0).rows_at(10**9, 10**9 + 4).tolist() == [13652, 13650, 13659, 13651]
    assert permutation(3, 1, 2, 8).tolist() == [4, 5, 2, 6, 1, 3, 0, 7]


def test_every_place_is_as_likely_for_every_row() -> None:
    places = np.stack([permutation(seed, 0, 0, 8) for seed in range(4000)])
    counts = np.stack([np.bincount(places[:, place], minlength=8) for place in range(8)])
    assert abs(counts - 500).max() < 5 * np.sqrt(500)


@pytest.mark.parametrize(("rank", "world"), [(0, 3), (2, 2), (-1, 2)])
def test_an_unequal_share_is_refused(rank: int, world: int) -> None:
    with pytest.raises(ValueError, match="equal share of 8 rows"):
        Order(5, 4, 0).step_rows(0, 8, rank, world)


def test_a_backward_range_is_refused() -> None:
    with pytest.raises(ValueError, match="start <= stop"):
        Order(5, 4, 0).rows_at(3, 2)
