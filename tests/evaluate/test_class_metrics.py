"""What is told of classifiers beside their accuracy, against scikit-learn and against sums by hand."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import f1_score

from overproof.evaluate.metrics import Bootstrap, further_metrics
from overproof.tasks.class_metrics import BINS, CLASS_METRICS, calibration_error, class_columns, multiclass_macro_f1

UNITS, CLASSES = 400, 6


def answers(sharpness: float = 2.0, units: int = UNITS) -> dict[str, np.ndarray]:
    """Of a classifier that is often right, on classes of very different size; the last is never there or named."""
    generator = np.random.default_rng(0)
    labels = generator.choice(CLASSES - 1, units, p=[0.6, 0.2, 0.1, 0.07, 0.03])
    logits = generator.normal(size=(units, CLASSES)) + sharpness * np.eye(CLASSES)[labels]
    logits[:, -1] = -50
    logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    return dict(class_columns(logprobs.astype(np.float32), labels.astype(np.int32)))


def test_macro_f1_is_scikit_learns_on_each_resample() -> None:
    columns, generator = answers(), np.random.default_rng(1)
    drawn = generator.integers(0, UNITS, (5, UNITS))
    drawn[4] = np.flatnonzero(columns["label"] != 2)[generator.integers(0, 300, UNITS)]  # one without a class
    counts = np.stack([np.bincount(row, minlength=UNITS) for row in drawn]).astype(float)
    expected = [f1_score(columns["label"][row], columns["choice"][row], average="macro") for row in drawn]
    np.testing.assert_allclose(multiclass_macro_f1(columns, counts), expected, atol=1e-12)


def test_calibration_error_is_the_mean_gap_of_bins() -> None:
    columns = answers()
    right, confidence, error = columns["label"] == columns["choice"], columns["confidence"].astype(float), 0.0
    for low in np.arange(BINS) / BINS:
        inside = (confidence >= low) & (confidence < low + 1 / BINS)
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    found = calibration_error(columns, np.ones((1, UNITS)))
    assert found == pytest.approx(error, abs=1e-6)
    sure = columns | {"confidence": np.ones(UNITS, np.float32)}
    assert calibration_error(sure, np.ones((1, UNITS))) == pytest.approx(1 - right.mean())


def test_each_has_its_unit_direction_and_an_interval_around_it() -> None:
    columns = answers()
    found = further_metrics(CLASS_METRICS, columns, UNITS, Bootstrap(400, 0.95, 0))
    assert [(each.name, each.unit, each.higher_is_better) for each in CLASS_METRICS] == [
        ("macro_f1", "share", True), ("calibration_error", "share", False)]  # fmt: skip
    for each in CLASS_METRICS:
        metric = found[each.name]
        assert metric.n == UNITS
        assert metric.low is not None
        assert metric.high is not None
        assert metric.low < metric.high
        assert metric.value == pytest.approx(float(each.value(columns, np.ones((1, UNITS)))[0]))
    assert found["macro_f1"].low < found["macro_f1"].value < found["macro_f1"].high  # type: ignore[operator]
    assert found == further_metrics(CLASS_METRICS, columns, UNITS, Bootstrap(400, 0.95, 0))
    assert further_metrics((), columns, UNITS, Bootstrap(400, 0.95, 0)) == {}
