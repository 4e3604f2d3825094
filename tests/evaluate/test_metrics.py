"""Intervals hold what they promise; pairs share their draws."""

from __future__ import annotations

import tracemalloc
from math import log

import numpy as np
import pytest
from pydantic import ValidationError

from overproof.evaluate.metrics import (
    Bootstrap,
    Clusters,
    PerExampleSums,
    Report,
    further_metrics,
    quality_metrics,
    resampled_sums,
)
from overproof.registry import TASKS
from overproof.tasks.base import FurtherMetric, Metric

BITS_PER_BYTE, ACCURACY = (TASKS[kind].quality for kind in ("language_modeling", "image_classification"))


def units_of(quality: np.ndarray, size: np.ndarray) -> PerExampleSums:
    return PerExampleSums(quality.astype(float), size.astype(float), np.zeros(len(size)), np.ones(len(size)))


def documents(count: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of documents of very different lengths, and nats at two a byte with noise that grows with length."""
    size = np.exp(generator.normal(7, 0.8, count))
    return size, size * (2 * log(2) + 0.3 * generator.normal(size=count))


@pytest.mark.parametrize("count", [12, 40, 200])
def test_interval_covers_the_truth_as_often_as_it_says(count: int) -> None:
    generator, covered, trials = np.random.default_rng(7), 0, 400
    for trial in range(trials):
        size, nats = documents(count, generator)
        metrics, _ = quality_metrics(BITS_PER_BYTE, {"a": units_of(nats, size)}, Bootstrap(300, 0.9, trial))
        found = metrics["a"]["bits_per_byte"]
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 2.0 <= found.high
    assert 0.85 <= covered / trials <= 0.95


def test_bits_per_byte_is_the_ratio_of_sums() -> None:
    metrics, comparisons = quality_metrics(
        BITS_PER_BYTE,
        {
            "student": units_of(np.array([8.0, 2.0]) * log(2), np.array([4, 1])),
            "small": units_of(np.array([9.0, 2.0]) * log(2), np.array([4, 1])),
        },
        Bootstrap(100, 0.95, 0),
    )
    assert metrics["student"]["bits_per_byte"].value == pytest.approx(2.0)
    assert metrics["student"]["bits_per_byte"].n == 2
    better, worse = comparisons
    assert (better.name, better.against) == ("student", "small")
    assert better.value == pytest.approx(-0.1 / 1.1)
    assert (worse.name, worse.against) == ("small", "student")
    assert worse.value == pytest.approx(0.1)


def test_accuracy_drop_is_positive_when_worse() -> None:
    ones = np.ones(4)
    exports = {
        "student": units_of(np.array([1, 1, 1, 0]), ones),
        "small": units_of(np.array([1, 1, 0, 0]), ones),
    }
    metrics, (_, drop) = quality_metrics(ACCURACY, exports, Bootstrap(100, 0.95, 0))
    assert metrics["student"]["accuracy"].value == 0.75
    assert drop.value == 0.25


def test_pairing_is_narrower_than_two_separate_intervals() -> None:
    generator = np.random.default_rng(3)
    size, nats = documents(60, generator)
    exports = {"student": units_of(nats, size), "small": units_of(nats * 1.01, size)}
    metrics, (_, paired) = quality_metrics(BITS_PER_BYTE, exports, Bootstrap(500, 0.95, 0))
    alone = [metrics[name]["bits_per_byte"] for name in ("small", "student")]
    assert paired.low == pytest.approx(0.01)
    assert paired.high == pytest.approx(0.01)
    assert alone[0].high / alone[1].low - 1 > 0.05  # type: ignore[operator]


def test_same_seed_same_report_other_seed_another() -> None:
    size, nats = documents(30, np.random.default_rng(0))
    first, again, other = (
        quality_metrics(BITS_PER_BYTE, {"a": units_of(nats, size)}, Bootstrap(200, 0.95, seed)) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_one_unit_has_no_interval() -> None:
    one = {"student": units_of(np.array([2.0]), np.array([1])), "small": units_of(np.array([2.0]), np.array([1]))}
    metrics, (_, comparison) = quality_metrics(BITS_PER_BYTE, one, Bootstrap(100, 0.95, 0))
    assert metrics["small"]["bits_per_byte"].low is None
    assert comparison.low is None
    assert comparison.high is None


def test_memory_does_not_grow_with_samples_times_units() -> None:
    columns_UC = np.ones((50_000, 4))
    tracemalloc.start()
    sums_SC = resampled_sums(columns_UC, Bootstrap(400, 0.95, 0))  # 20 M draws, 160 MB at once
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (sums_SC == 50_000).all()
    assert peak_bytes < 140e6


def test_report_refuses_what_is_no_figure_or_no_field() -> None:
    with pytest.raises(ValidationError):
        Metric(value=float("nan"), unit="s", n=1)
    told = {"task": "language_modeling", "quality": "bits_per_byte", "engine": "any", "computes_with": "any"}
    whole = told | {"confidence": 0.9, "measured": [], "comparisons": []}
    Report.model_validate(whole)
    with pytest.raises(ValidationError, match="extra"):
        Report.model_validate(whole | {"extra": 1})


def test_copies_are_resampled_as_one() -> None:
    """Each unit twice tells no more than once: clusters of both have the intervals of the units alone."""
    generator = np.random.default_rng(0)
    nats, size = generator.gamma(2.0, 50.0, 40), generator.integers(50, 150, 40)
    once = {"a": units_of(nats, size), "b": units_of(1.1 * nats, size)}
    twice = {name: units_of(np.repeat(u.total, 2), np.repeat(u.size, 2)) for name, u in once.items()}
    bootstrap = Bootstrap(300, 0.95, 0)
    alone, compared_alone = quality_metrics(BITS_PER_BYTE, once, bootstrap)
    clusters = Clusters.of(np.repeat(np.arange(40), 2) * 7)
    together, compared_together = quality_metrics(BITS_PER_BYTE, twice, bootstrap, clusters)
    found, copied = alone["a"]["bits_per_byte"], together["a"]["bits_per_byte"]
    assert (copied.low, copied.high) == (pytest.approx(found.low), pytest.approx(found.high))
    assert (found.n, copied.n) == (40, 80)
    for one, other in zip(compared_alone, compared_together, strict=True):
        assert (other.low, other.high) == (pytest.approx(one.low), pytest.approx(one.high))
    narrow, _ = quality_metrics(BITS_PER_BYTE, twice, bootstrap)
    assert narrow["a"]["bits_per_byte"].low > copied.low
    assert clusters.first(3).of_unit_U.tolist() == [0, 0, 1]
    assert quality_metrics(BITS_PER_BYTE, twice, bootstrap, Clusters.of(np.zeros(80)))[0]["a"]["agreement"].low is None
    further = FurtherMetric(
        "mean", "mean", "x", True, lambda columns, counts_SU: counts_SU @ columns["x"] / counts_SU.sum(1)
    )
    columns, doubled = {"x": nats}, {"x": np.repeat(nats, 2)}
    mean, same = (
        further_metrics((further,), columns, 40, bootstrap)["mean"],
        further_metrics((further,), doubled, 80, bootstrap, clusters)["mean"],
    )
    assert (same.low, same.high) == (pytest.approx(mean.low), pytest.approx(mean.high))
