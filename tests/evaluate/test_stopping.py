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
from overproof.evaluate import stage
from overproof.evaluate.metrics import Bootstrap, Comparison, PerExampleSums, Report, quality_metrics
from overproof.evaluate.stopping import FEWEST, next_count, time_limits, widest
from overproof.export.stage import Export, read_exports
from overproof.registry import TASKS
from overproof.stage_context import StageContext, no_progress
from overproof.tasks.base import FEWEST_UNITS, Metric

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


def share(rule: dict[str, Any], low: float | None, high: float | None, kept: tuple[float, float] | None = None) -> Any:
    metric = Metric(value=0.9, low=low, high=high, unit="share", n=9)
    comparisons = [
        Comparison(name="small", against=against, value=0.0, low=low, high=high).model_copy(
            update={} if kept is None else {"kept_low": kept[0], "kept_high": kept[1]}
        )
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
    assert share({"kind": "keep", "at_least": 0.9}, 0.0, 9.9, kept=(0.94, 0.96)) == pytest.approx(0.1)
    assert share({"kind": "keep", "at_least": 0.9}, 0.0, 0.001) == float("inf")
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


def test_what_is_kept_of_an_accuracy_is_its_share_and_covered_as_often_as_it_says() -> None:
    """Of a reference that is right in six cases of ten a candidate keeps 70 %: 18 points are 30 % of it."""
    generator, truth, trials, count = np.random.default_rng(7), 0.7, 400, 300
    rule, quality, covered = RULE.validate_python({"kind": "keep", "at_least": 0.6}), TASKS["image_classification"], 0
    ones = np.ones(count)
    for trial in range(trials):
        right = (generator.random(count) < 0.6).astype(float)
        fewer = right * (generator.random(count) < truth)
        sums = {
            name: PerExampleSums(values, ones, ones, ones) for name, values in (("teacher", right), ("small", fewer))
        }
        metrics, comparisons = quality_metrics(quality.quality, sums, Bootstrap(400, 0.9, trial))
        comparison = next(c for c in comparisons if c.name == "small")
        assert comparison.kept == pytest.approx(fewer.sum() / right.sum())
        assert comparison.kept_low is not None
        assert comparison.kept_high is not None
        covered += comparison.kept_low <= truth <= comparison.kept_high
        found = widest([rule], [candidate()], metrics, comparisons)
        assert found == pytest.approx((comparison.kept_high - comparison.kept_low) / 2 / 0.4)
    assert 0.85 <= covered / trials <= 0.95


def test_nothing_is_kept_of_nothing() -> None:
    """A reference that is never right, in all or in some resample: there is no share, and no rule stops by one."""
    ones, quality = np.ones(12), TASKS["image_classification"].quality
    for right in (np.zeros(12), np.eye(12)[0]):
        sums = {
            name: PerExampleSums(values, ones, ones, ones) for name, values in (("teacher", right), ("small", ones))
        }
        metrics, comparisons = quality_metrics(quality, sums, Bootstrap(200, 0.95, 0))
        comparison = next(c for c in comparisons if c.name == "small")
        assert (comparison.kept_low, comparison.kept_high) == (None, None)
        rule = RULE.validate_python({"kind": "keep", "at_least": 0.9})
        assert widest([rule], [candidate()], metrics, comparisons) == float("inf")


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
    assert {len(scores.units) for scores in hurried.scores.values()} == {FEWEST_UNITS}
    assert "; evaluate.score_s allows 1e-09 s" in hurried.summary
    one, many = (scored(max_documents=100, concurrent_tasks=tasks) for tasks in (1, 9))
    for name, scores in one.scores.items():
        for field in ("units", "total", "size", "predictions", "choices_N"):
            np.testing.assert_array_equal(getattr(scores, field), getattr(many.scores[name], field))
    cut = scored(max_documents=50)
    assert cut.summary.startswith("50 of 597 images (evaluate.max_documents takes 50), ")
    assert cut.available == whole.available == 597
    exports = read_exports(digits["compress"].local())
    report = stage.make_report(make_recipe("digits"), exports, cut, {export.name: {} for export in exports})
    report = Report.model_validate_json(report.model_dump_json())
    for export, measured in zip(exports, report.measured, strict=True):
        assert measured.metrics["accuracy"].measured_on == "50 of 597"
        assert ("conversion_nats" in measured.metrics) == (export.format == "fp32")  # as it was written
    teacher, compared = report.find("teacher"), report.compare("student", "teacher")
    student = report.find("student")
    assert teacher is not None
    assert student is not None
    assert compared is not None
    share = student.metrics["accuracy"].value / teacher.metrics["accuracy"].value
    assert compared.kept == pytest.approx(share)
    assert student.metrics["conversion_nats"].n == 1


def test_files_whose_time_ends_earlier_end_the_round_for_all(
    make_recipe: Callable[..., Recipe], digits: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the others scored beyond is left, and scored again where time allows."""
    rounds = list[int]()

    def slow_teacher(function: Any, calls: dict[str, tuple[Any, ...]], *_: Any, **__: Any) -> dict[str, Any]:
        found = {name: function(*arguments) for name, arguments in calls.items()}
        scores, took_s = found["teacher"]
        rounds.append(len(scores.units))
        return {**found, "teacher": (scores.first(20), took_s)}

    monkeypatch.setattr(stage, "run_tasks", slow_teacher)
    recipe = make_recipe("digits", [{"kind": "agreement", "at_least": 0.5}])
    asked = recipe.model_copy(
        update={"evaluate": recipe.evaluate.model_copy(update={"score_s": 1e6, "max_documents": 70})}
    )
    context = StageContext(asked, digits, None, no_progress)  # type: ignore[arg-type]
    found = stage._score_all(context, read_exports(digits["compress"].local()))
    assert rounds == [32, 20, 30, 10]
    expected = TASKS["image_classification"].units(digits["prepare"].local(), 70)
    for scores in found.scores.values():
        np.testing.assert_array_equal(scores.units, expected)


def test_the_time_is_shared_between_files_as_they_took_it() -> None:
    settings = Evaluate(score_s=60, concurrent_tasks=2)
    seconds = {"teacher": 0.0, "small": 0.0, "q": 0.0}
    assert time_limits(Evaluate(), seconds, 0.0) == dict.fromkeys(seconds)
    assert time_limits(settings, seconds, 0.0) == dict.fromkeys(seconds, 40.0)  # two at a time end with 60 s
    assert time_limits(settings, {"small": 0.0}, 0.0) == {"small": 60.0}
    taken = {"teacher": 24.0, "small": 12.0, "q": 4.0}  # in 20 s, two at a time
    assert time_limits(settings, taken, 20.0) == {"teacher": 48.0, "small": 24.0, "q": 8.0}
