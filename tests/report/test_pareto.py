"""The frontier against plain readings of its definitions, on every kind of tie."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from overproof.report.pareto import hypervolume, non_dominated, standings

SIDE = 6  # of the grid that points lie on: ties are common, and volumes can be counted


@st.composite
def points(draw: st.DrawFn, objectives: tuple[int, ...] = (2, 3)) -> np.ndarray:
    width = draw(st.sampled_from(objectives))
    rows = draw(st.lists(st.tuples(*[st.integers(0, SIDE)] * width), max_size=9))
    return np.array(rows, float).reshape(len(rows), width)


def beats(a: np.ndarray, b: np.ndarray) -> bool:
    return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))


@given(points((1, 2, 3, 4)))
def test_members_are_those_that_nothing_beats(costs: np.ndarray) -> None:
    assert non_dominated(costs).tolist() == [not any(beats(other, each) for other in costs) for each in costs]


@given(points((2, 3)))
def test_everything_else_is_beaten_by_a_member(costs: np.ndarray) -> None:
    member = non_dominated(costs)
    assert not len(costs) or member.any()
    for each in costs[~member]:
        assert any(beats(other, each) for other in costs[member])


@given(points((2, 3)))
def test_hypervolume_is_the_number_of_unit_cells_above_a_point(costs: np.ndarray) -> None:
    width = costs.shape[1]
    cells = sum(any((each <= corner).all() for each in costs) for corner in product(range(SIDE), repeat=width))
    assert hypervolume(costs, np.full(width, float(SIDE))) == cells


@given(points((2, 3)), st.integers(0, 8))
def test_hypervolume_counts_the_members_alone_and_in_any_order(costs: np.ndarray, seed: int) -> None:
    reference = np.full(costs.shape[1], float(SIDE))
    shuffled = np.random.default_rng(seed).permutation(costs[non_dominated(costs)])
    assert hypervolume(shuffled, reference) == pytest.approx(hypervolume(costs, reference))


@given(points((3,)))
def test_a_third_objective_that_all_share_is_a_factor(costs: np.ndarray) -> None:
    costs[:, 2] = 1.0
    reference = np.array([SIDE, SIDE, 3.0])
    assert hypervolume(costs, reference) == pytest.approx(2 * hypervolume(costs[:, :2], reference[:2]))


@given(points((2,)), st.data())
def test_standings_hold_wherever_the_truth_lies_within_the_intervals(costs: np.ndarray, data: st.DataObject) -> None:
    """The second cost is uncertain: each pair's difference is somewhere within a width of the one that is seen."""
    width = data.draw(st.sampled_from([0.0, 0.5, 2.0]))
    seen = costs[:, 1][:, None] - costs[:, 1][None, :]
    found = standings(costs[:, :1], seen - width, seen + width)
    shift = np.array(data.draw(st.lists(st.floats(-width / 2, width / 2), min_size=len(costs), max_size=len(costs))))
    truth = non_dominated(np.column_stack([costs[:, 0], costs[:, 1] + shift]))
    for standing, member in zip(found, truth, strict=True):
        assert standing != "certain" or member
        assert standing != "beaten" or not member


def test_without_doubt_every_point_is_certain_or_beaten_and_ties_stay_open() -> None:
    sizes, quality = np.array([[1.0], [2.0], [3.0], [3.0]]), np.array([3.0, 2.0, 2.5, 1.0])
    seen = quality[:, None] - quality[None, :]
    assert standings(sizes, seen, seen) == ["certain", "certain", "beaten", "certain"]
    twins = np.zeros((2, 2))
    assert standings(np.ones((2, 1)), twins, twins) == ["open", "open"]
    unknown = np.full((2, 2), np.nan)
    assert standings(np.array([[1.0], [2.0]]), unknown, unknown) == ["certain", "open"]


def test_what_has_no_order_or_no_exact_volume_is_refused() -> None:
    holes = np.array([[1.0, np.nan]])
    for call in (lambda: non_dominated(holes), lambda: hypervolume(holes, np.ones(2))):
        with pytest.raises(ValueError, match="not a number"):
            call()
    with pytest.raises(ValueError, match="or three"):
        hypervolume(np.zeros((1, 4)), np.ones(4))


def test_infinite_costs_are_beaten_and_add_nothing() -> None:
    costs = np.array([[1.0, 1.0], [np.inf, 0.0], [np.inf, 2.0]])
    assert non_dominated(costs).tolist() == [True, True, False]
    assert hypervolume(costs, np.array([2.0, 2.0])) == 1.0
