"""A quantile is bounded by order statistics as often as they say, whatever is measured."""

from __future__ import annotations

from math import log

import numpy as np
import pytest

from overproof.engines.order_statistics import fewest_values, median_half_width, upper_bound


@pytest.mark.parametrize(
    ("share", "confidence", "count"), [(0.95, 0.95, 59), (0.95, 0.9, 45), (0.95, 0.99, 90), (0.5, 0.95, 5)]
)
def test_as_many_values_as_a_bound_takes(share: float, confidence: float, count: int) -> None:
    """Of the published tables of one-sided tolerance limits without a distribution."""
    assert fewest_values(share, confidence) == count
    values = [float(i) for i in range(count)]
    assert upper_bound(values, share, confidence) == values[-1]
    assert upper_bound(values[:-1], share, confidence) is None
    assert upper_bound([], share, confidence) is None


@pytest.mark.parametrize(("count", "place"), [(59, 59), (92, 92), (93, 92), (123, 122), (124, 122), (181, 177)])
def test_the_order_of_values_makes_no_difference_and_their_place_is_the_tables(count: int, place: int) -> None:
    values = np.random.default_rng(count).permutation(np.arange(1.0, count + 1)).tolist()
    assert upper_bound(values, 0.95, 0.95) == place


@pytest.mark.parametrize("count", [59, 93, 300])
def test_a_bound_covers_as_often_as_it_says(count: int) -> None:
    generator = np.random.default_rng(3)
    samples = generator.exponential(size=(1500, count))
    covered = sum((upper_bound(row.tolist(), 0.95, 0.95) or 0) >= -log(0.05) for row in samples)
    assert covered / len(samples) >= 0.94  # of 0.95; three standard errors are 0.017
    plain = np.quantile(samples, 0.95, axis=1, method="inverted_cdf") >= -log(0.05)
    assert plain.mean() < 0.65  # what the sample's own p95 does


def test_p50_is_bounded_by_its_neighbours_in_order() -> None:
    assert median_half_width([float(i) for i in range(1, 21)]) == (16 - 5) / 2  # 95.9 %, by the binomial tables
    assert median_half_width([2.0] * 20) == 0
    generator, covered = np.random.default_rng(5), 0
    for _ in range(2000):
        values = generator.exponential(size=30).tolist()
        low, high = sorted(values)[8], sorted(values)[21]
        assert median_half_width(values) == (high - low) / 2
        covered += low <= log(2) <= high
    assert covered / 2000 >= 0.95
