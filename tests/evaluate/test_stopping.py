"""Scoring stops by the widths of intervals alone, and what it stops at still covers the truth."""

from __future__ import annotations

from collections.abc import Callable
from math import log
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter

from overproof.artifacts import Artifact
from overproof.config import Evaluate, Recipe, Rule
from overproof.engines.probe import median_half_width
from overproof.evaluate import stage
from overproof.evaluate.metrics import Bootstrap, Comparison, PerExampleSums, quality_metrics
from overproof.evaluate.stopping import FEWEST, next_count, widest
from overproof.export.stage import Export, read_exports
from overproof.registry import TASKS
from overproof.stage_context import StageContext, no_progress
from overproof.tasks.base import Metric

RULE: TypeAdapter[Rule] = TypeAdapter(Rule)


def counts(available: int, seconds_a_unit: float, **settings: Any) -> list[int]:
    """How many units are scored after each round that nothing else ends."""
    done, found = 0, list[int]()
    while done < available:
        upto = next_count(done, available, Evaluate(**settings), done * seconds_a_unit)
        if upto == done:
            break
        done = upto
        found.append(done)
    return found


def test_rounds_double_and_end_with_the_time() -> None:
    assert counts(1000, 1.0) == [1000]
    assert counts(1000, 1.0, narrow=0.1) == [32, 64, 128, 256, 512, 1000]
    assert counts(20, 1.0, narrow=0.1) == [20]
    assert counts(1000, 1.0, score_s=200) == [32, 64, 128, 200]
    assert counts(1000, 1.0, score_s=5) == [FEWEST]  # there is no verdict without the first round
    assert counts(1000, 1.0, narrow=0.1, score_s=1e6) == [32, 64, 128, 256, 512, 1000]


def candidate(name: str = "small") -> Export:
    return Export(name=name, student="student", file="", format="", size_bytes=1, candidate=True)


def share(rule: dict[str, Any], low: float | None, high: float | None) -> float | None:
    metric = Metric(value=0.9, low=low, high=high, unit="share", n=9)
    comparisons = [
        Comparison(name="small", against=against, value=0.0, low=low, high=high)
        for against in ("student", "control", "teacher")
    ]
    return widest([RULE.validate_python(rule)], [candidate()], {"small": {"agreement": metric}}, comparisons)


def test_widths_are_shares_of_what_a_rule_allows_wherever_the_interval_lies() -> None:
    regression = {"kind": "regression", "at_most": 0.03}
    for middle in (-0.5, 0.0, 0.029, 5.0):
        assert share(regression, middle - 0.003, middle + 0.003) == pytest.approx(0.1)
    assert share({"kind": "improvement", "at_least": 0.02}, 0.1, 0.102) == pytest.approx(0.05)
    assert share({"kind": "improvement", "at_least": 0.0}, 0.1, 0.102) == float("inf")
    assert share({"kind": "agreement", "at_least": 0.9}, 0.91, 0.93) == pytest.approx(0.1)
    assert share(regression, None, None) == share(regression, 0.0, 0.0) == float("inf")
    assert share({"kind": "quality", "limit": 2.0}, 0.0, 0.1) == float("inf")
    assert share({"kind": "smaller", "at_least": 4}, 0.0, 0.1) is None
    assert share({"kind": "parity", "at_most": 0.1}, 0.0, 0.1) is None


def test_where_it_stops_the_interval_covers_as_often_as_it_says() -> None:
    """Documents of very different lengths; a candidate that is 2 % worse, with noise; an interval of 90 %."""
    generator, truth, trials = np.random.default_rng(11), 0.02, 400
    quality, covered, used = TASKS["language_modeling"].quality, 0, list[int]()
    rule, settings = RULE.validate_python({"kind": "regression", "at_most": 0.03}), Evaluate(narrow=0.15)
    for trial in range(trials):
        size = np.exp(generator.normal(7, 0.8, 512))
        nats = size * 2 * log(2) * (1 + 0.1 * generator.normal(size=512))
        worse = nats * (1 + truth + 0.02 * generator.normal(size=512))
        done = 0
        while done < 512:
            done = next_count(done, 512, settings, 0.0)
            sums = {
                name: PerExampleSums(values[:done], size[:done], np.zeros(done), np.ones(done))
                for name, values in (("student", nats), ("small", worse))
            }
            metrics, comparisons = quality_metrics(quality, sums, Bootstrap(200, 0.9, trial))
            found = widest([rule], [candidate()], metrics, comparisons)
            if found is not None and found <= settings.narrow:
                break
        comparison = next(c for c in comparisons if c.name == "small")
        assert comparison.low is not None
        assert comparison.high is not None
        covered += comparison.low <= truth <= comparison.high
        used.append(done)
    assert len(set(used)) > 1  # it does stop, and not always at once
    assert np.mean(used) < 512
    assert 0.85 <= covered / trials <= 0.95


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


def test_rounds_add_up_to_what_one_gives(
    make_recipe: Callable[..., Recipe], digits: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_here(function: Callable[..., Any], calls: dict[str, tuple[Any, ...]], *_: Any, **__: Any) -> dict[str, Any]:
        return {name: function(*arguments) for name, arguments in calls.items()}

    monkeypatch.setattr(stage, "run_tasks", run_here)

    def scored(**changes: Any) -> stage.Scored:
        recipe = make_recipe("digits", [{"kind": "agreement", "at_least": 0.5}])
        asked = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update=changes)})
        context = StageContext(asked, digits, None, no_progress)  # type: ignore[arg-type]
        return stage._score_all(context, read_exports(digits["compress"].local()))

    whole, some = scored(), scored(narrow=0.2)
    assert whole.summary.startswith("597 of 597 images, ")
    count = len(some.scores["teacher"].units)
    assert FEWEST < count < 597
    assert f"{count} of 597 images" in some.summary
    assert "every interval that a rule looks at is within 0." in some.summary
    for name, scores in whole.scores.items():
        np.testing.assert_array_equal(scores.units[:count], some.scores[name].units)
        np.testing.assert_array_equal(scores.total[:count], some.scores[name].total)
        np.testing.assert_array_equal(scores.choices_N[:count], some.scores[name].choices_N)
        assert some.seconds[name] > 0
    hurried = scored(score_s=1e-9)
    assert len(hurried.scores["teacher"].units) == FEWEST
    assert "; evaluate.score_s allows 1e-09 s" in hurried.summary
