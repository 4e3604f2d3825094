"""The gate passes what is proven, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from overproof.config import Gate
from overproof.engines.probe_messages import ArrayAnswer
from overproof.errors import InputError
from overproof.evaluate.gate import Verdict, judge, requests_needed
from overproof.evaluate.metrics import Comparison, MeasuredFile, Report
from overproof.tasks.base import Metric, cost_metrics

REGRESSION = {"kind": "regression", "against": "student", "at_most": 0.03}
STUDENT = dict.fromkeys(("student", "big", "small", "q", "bare"), "student")
PARITY = {"kind": "parity", "at_most": 0.1}


def metric(value: float, low: float | None = None, high: float | None = None) -> Metric:
    return Metric(value=value, low=low, high=high, unit="any", n=10)


def measured(name: str, size_bytes: int, candidate: bool, **metrics: Metric) -> MeasuredFile:
    return MeasuredFile(
        name=name,
        student=STUDENT.get(name),
        format="any",
        size_bytes=size_bytes,
        sha256="0" * 64,
        candidate=candidate,
        metrics=metrics,
    )


def report(*comparisons: tuple[str, str, float, float | None, float | None], **changes: Any) -> Report:
    parity = {"parity_nats": metric(0.02)}
    full: dict[str, Any] = {
        "task": "language_modeling",
        "quality": "bits_per_byte",
        "engine": "any",
        "computes_with": "any",
        "confidence": 0.95,
        "measured": (
            measured("teacher", 1000, False),
            measured("student", 400, False),
            measured("big", 200, True, agreement=metric(0.8, 0.7, 0.9), **parity),
            measured("small", 100, True, agreement=metric(0.8, 0.6, 0.9), **parity),
        ),
        "comparisons": tuple(
            Comparison(name=n, against=a, value=v, low=low, high=high) for n, a, v, low, high in comparisons
        ),
    }
    return Report(**full | changes)


def verdict(rules: list[dict[str, Any]], of: Report) -> Verdict:
    return judge(Gate.model_validate({"rules": rules}), of)


def test_smallest_that_passes_is_chosen() -> None:
    both = report(("big", "student", 0.01, 0.0, 0.02), ("small", "student", 0.02, 0.01, 0.029))
    found = verdict([REGRESSION, PARITY], both)
    assert found.passed
    assert found.chosen == "small"
    reason = found.candidates[1].reasons[0]
    assert reason.text == ("bits per byte 2.00 % worse than student (interval 1.00 to 2.90 %), allowed 3 %")


def test_wide_interval_cannot_pass() -> None:
    wide = report(("big", "student", 0.01, 0.0, 0.02), ("small", "student", 0.0, -0.05, 0.031))
    found = verdict([REGRESSION], wide)
    assert found.chosen == "big"
    assert not found.candidates[1].passed


def test_improvement_is_judged_at_its_near_end() -> None:
    better = report(("big", "control", -0.05, -0.07, -0.03), ("small", "control", -0.05, -0.11, 0.001))
    rules = [{"kind": "improvement", "against": "control", "at_least": 0.0}]
    found = verdict(rules, better)
    assert [c.passed for c in found.candidates] == [True, False]
    assert "5.00 % better than control (interval 3.00 to 7.00 %)" in found.candidates[0].reasons[0].text
    assert "(interval -0.10 to 11.00 %)" in found.candidates[1].reasons[0].text
    assert not verdict([{**rules[0], "at_least": 0.03}], better).passed  # more than, not as much as


def test_agreement_is_judged_at_its_low_end() -> None:
    found = verdict([{"kind": "agreement", "at_least": 0.65}], report())
    assert [c.passed for c in found.candidates] == [True, False]
    assert "80.0 % (interval 60.0 % to 90.0 %), needed 65 %" in found.candidates[1].reasons[0].text


def test_smaller_counts_times() -> None:
    found = verdict([{"kind": "smaller", "against": "teacher", "at_least": 8}], report())
    assert [c.reasons[0].text for c in found.candidates] == [
        "5.00 times smaller than teacher, needed 8 times",
        "10.00 times smaller than teacher, needed 8 times",
    ]
    assert found.chosen == "small"


def test_keep_is_judged_by_the_share_at_the_far_end_of_its_interval() -> None:
    """The share of the quality, whatever a difference is told in."""
    rule = {"kind": "keep", "against": "teacher", "at_least": 0.95}
    for task, quality, title, times in (
        ("language_modeling", "bits_per_byte", "quality", "1.020 times its bits per byte; "),
        ("image_classification", "accuracy", "accuracy", ""),
    ):
        differences = (("big", "teacher", 0.02, 0.0, 0.9), ("small", "teacher", 0.02, 0.0, 0.01), ("q", "big", 0, 0, 0))
        of = report(*differences, task=task, quality=quality)
        kept = (
            {"kept": 0.98, "kept_low": 0.95, "kept_high": 1.01},
            {"kept": 0.98, "kept_low": 0.949, "kept_high": 1.0},
        )
        compared = [c.model_copy(update=shares) for c, shares in zip(of.comparisons, (*kept, {}), strict=True)]
        found = verdict([rule], of.model_copy(update={"comparisons": tuple(compared)}))
        assert [c.passed for c in found.candidates] == [True, False]
        assert found.candidates[1].reasons[0].text == (
            f"keeps 98.0 % of teacher's {title} ({times}at the far end of the interval 94.9 %), needed 95 %"
        )


def timed(seconds: Sequence[float], confidence: float = 0.95) -> Report:
    """A report on a file whose requests took so long."""
    answer = ArrayAnswer(before_mb=1, resident_mb=2, contended_cores=0.5, latency_s=list(seconds), logprobs=[])
    file = measured("big", 1, True, **cost_metrics(answer, 1000, confidence))
    return report(measured=(file,), confidence=confidence)


@pytest.mark.parametrize(
    ("requests", "confidence", "needed"), [(3, 0.95, 59), (20, 0.95, 59), (58, 0.95, 59), (59, 0.99, 90)]
)
def test_a_latency_of_too_few_requests_is_not_shown_however_quick_they_were(
    requests: int, confidence: float, needed: int
) -> None:
    found = verdict([{"kind": "latency", "at_most_ms": 40}], timed([1e-6] * requests, confidence))
    assert not found.passed
    assert found.candidates[0].reasons[0].text == (
        f"p95 latency not shown: {requests} requests, needs {needed}: raise evaluate.probe_s"
    )
    assert verdict([{"kind": "latency", "at_most_ms": 40}], timed([1e-6] * needed, confidence)).passed
    assert verdict([{"kind": "latency", "percentile": 50, "at_most_ms": 40}], timed([1e-6] * 7, 0.99)).passed


def test_a_latency_is_judged_by_its_upper_bound_and_not_by_the_sample() -> None:
    """Of 59 requests the slowest bounds p95, of 93 the second slowest: one may be late."""
    rule = {"kind": "latency", "at_most_ms": 40}
    for requests, late, passes in ((59, 0, True), (59, 1, False), (92, 1, False), (93, 1, True), (93, 2, False)):
        of = timed([0.05] * late + [0.01] * (requests - late))
        assert of.measured[0].metrics["latency_p95_s"].value == 0.01
        assert verdict([rule], of).passed == passes, (requests, late)
    assert verdict([{**rule, "percentile": 50}], timed([0.05] + [0.01] * 58)).passed


def test_a_gate_asks_for_as_many_requests_as_its_latency_rules_need() -> None:
    rules = [{"kind": "latency", "percentile": share, "at_most_ms": 40} for share in (50, 95)]
    for asked, needed in (((), 0), (rules[:1], 5), (rules, 59)):
        assert requests_needed(Gate.model_validate({"rules": [PARITY, *asked]}).rules, 0.95) == needed


def test_absolute_limits() -> None:
    quick, slow = ({"latency_p95_s": Metric(value=0.01, high=bound, unit="s", n=60),
                    "bits_per_byte": metric(2.0, 1.8, high)}
                   for bound, high in ((0.03, 2.1), (0.05, 2.3)))  # fmt: skip
    files = (measured("big", 2_000_000, True, **quick), measured("small", 1_000_000, True, **slow))
    for rule, passed, text in (
        ({"kind": "size", "at_most_mb": 1.5}, [False, True], "2 MB, allowed 1.5 MB"),
        ({"kind": "latency", "at_most_ms": 40}, [True, False],
         "p95 latency 10.0 ms, at most 30.0 ms (60 requests), allowed 40.0 ms"),
        ({"kind": "quality", "limit": 2.2}, [True, False],
         "bits per byte 2 (interval 1.8 to 2.1), needed at most 2.2"),
    ):  # fmt: skip
        found = verdict([rule], report(measured=files))
        assert [c.passed for c in found.candidates] == passed
        assert found.candidates[0].reasons[0].text == text
    accurate = (measured("big", 1, True, accuracy=metric(0.9, 0.85, 0.95)),)
    for limit, passes in ((0.85, True), (0.86, False)):
        of = report(measured=accurate, quality="accuracy", task="image_classification")
        assert verdict([{"kind": "quality", "limit": limit}], of).passed == passes


@pytest.mark.parametrize(
    ("rules", "accuracy", "bits"),  # whether they bound either
    [
        ([REGRESSION, PARITY, {"kind": "smaller", "at_least": 2}, {"kind": "size", "at_most_mb": 1}], False, False),
        ([{"kind": "improvement"}], False, False),
        ([{**REGRESSION, "against": "teacher"}], True, True),
        ([{**REGRESSION, "against": "teacher", "at_most": 0.5}], False, True),
        ([{**REGRESSION, "against": "teacher", "at_most": 1.0}], False, False),
        ([{"kind": "keep", "at_least": 0.9}], True, True),
        ([{"kind": "keep", "at_least": 0.5}, {"kind": "agreement", "at_least": 0}], False, False),
        ([{"kind": "agreement", "at_least": 0.9}], True, True),
        ([PARITY, {"kind": "quality", "limit": 2}], True, True),
        ([{"kind": "quality", "limit": 0}], False, True),
    ],
)
def test_a_gate_knows_whether_it_bounds_quality(rules: list[dict[str, Any]], accuracy: bool, bits: bool) -> None:
    gate = Gate.model_validate({"rules": rules})
    assert gate.bounds_quality(higher_is_better=True, relative=False) == accuracy
    assert gate.bounds_quality(higher_is_better=False, relative=True) == bits


@pytest.mark.parametrize(
    ("rule", "missing"),
    [
        (
            {"kind": "keep", "at_least": 0.9},
            "what it keeps of teacher's bits per byte is not in the report, or has no interval",
        ),
        ({"kind": "quality", "limit": 1}, "bits per byte is not in the report, or has no interval"),
        ({"kind": "latency", "percentile": 50, "at_most_ms": 1}, "p50 latency is not in the report"),
        (REGRESSION, "bits per byte against student is not in the report"),
        ({"kind": "improvement", "against": "control"}, "bits per byte against control is not in the report"),
        ({"kind": "agreement", "at_least": 0}, "agreement with teacher is not in the report"),
        ({"kind": "smaller", "against": "control", "at_least": 1}, "the size of control is not in the report"),
        (PARITY, "parity_nats of the serving engine is not in the report"),
    ],
)
def test_missing_figure_fails_and_is_named(rule: dict[str, Any], missing: str) -> None:
    found = verdict([rule], report(measured=(measured("bare", 1, True),)))
    assert not found.passed
    assert found.candidates[0].reasons[0].text == missing


def test_no_interval_no_pass() -> None:
    single = report(("big", "student", 0.0, None, None), ("small", "student", 0.0, None, None))
    assert not verdict([REGRESSION], single).passed
    assert "more than one test unit" in verdict([REGRESSION], single).candidates[0].reasons[0].text


def test_parity_needs_the_same_tokens_too() -> None:
    splits = report(measured=(measured("q", 1, True, parity_nats=metric(0.01), split_otherwise=metric(0.1)),))
    found = verdict([PARITY], splits)
    assert not found.passed
    assert "splits 10 % of 10 test documents into other tokens" in found.candidates[0].reasons[0].text
    assert verdict([PARITY | {"split_otherwise": 0.1}], splits).passed
    assert not verdict([PARITY | {"split_otherwise": 0.09}], splits).passed
    assert not verdict([PARITY], report(measured=(measured("q", 1, True, parity_nats=metric(0.11)),))).passed


@pytest.mark.parametrize(("nats", "words"), [(0.0123, "0.012"), (1.5e-4, "0.00015"), (4.77e-7, "4.8e-07"), (0.0, "0")])
def test_a_tiny_difference_is_readable(nats: float, words: str) -> None:
    found = verdict([PARITY], report(measured=(measured("q", 1, True, parity_nats=metric(nats)),)))
    assert f"engine within {words} nats of the reference" in found.candidates[0].reasons[0].text


def test_without_candidates_nothing_passes() -> None:
    found = verdict([PARITY], report(measured=(measured("student", 1, False),)))
    assert (found.passed, found.chosen, found.candidates) == (False, None, ())


def test_accuracy_is_told_in_points() -> None:
    drop = report(("small", "student", 0.012, 0.002, 0.021), quality="accuracy", task="image_classification")
    found = verdict([{**REGRESSION, "at_most": 0.02}], drop)
    assert not found.passed
    assert found.candidates[1].reasons[0].text == (
        "accuracy 1.20 points lower than student (interval 0.20 to 2.10 points), allowed 2 points"
    )


def test_each_candidate_is_held_against_its_own_student() -> None:
    sizes = (("wide", "wide", 400), ("slim", "slim", 150), ("wide-q", "wide", 100), ("slim-q", "slim", 90))
    pair = tuple(
        MeasuredFile(name=n, student=s, format="any", size_bytes=b, sha256="0" * 64, candidate=n != s, metrics={})
        for n, s, b in sizes
    )
    both = report(("wide-q", "wide", 0.01, 0.0, 0.02), ("slim-q", "slim", 0.05, 0.04, 0.06),
                  ("slim-q", "wide", 0.0, 0.0, 0.0), measured=pair)  # fmt: skip
    assert both.winner == "wide"
    found = verdict([REGRESSION, {"kind": "smaller", "against": "student", "at_least": 2}], both)
    assert found.chosen == "wide-q"
    assert [r.text for r in found.candidates[1].reasons] == [
        "bits per byte 5.00 % worse than slim (interval 4.00 to 6.00 %), allowed 3 %",
        "1.67 times smaller than slim, needed 2 times",
    ]


def test_a_named_candidate_is_chosen_if_it_passed_and_no_other_instead() -> None:
    both = report(("big", "student", 0.01, 0.0, 0.02), ("small", "student", 0.02, 0.01, 0.029))
    named = Gate.model_validate({"rules": [REGRESSION], "candidate": "big"})
    assert judge(named, both).chosen == "big"
    bad = report(("big", "student", 0.05, 0.04, 0.06), ("small", "student", 0.02, 0.01, 0.029))
    refused = judge(named, bad)
    assert (refused.passed, refused.chosen) == (False, None)
    assert [c.passed for c in refused.candidates] == [False, True]
    with pytest.raises(InputError, match=r"gate\.candidate: found 'huge'; expected one of big, small"):
        judge(Gate.model_validate({"rules": [REGRESSION], "candidate": "huge"}), both)


def test_expected_answers_are_judged_at_the_lower_end() -> None:
    rules = [{"kind": "expected", "at_least": 0.75}]
    asked = tuple(
        measured(name, size, True, expected_accuracy=Metric(value=0.9, low=low, high=0.97, unit="share", n=40, of=60))
        for name, size, low in (("big", 200, 0.77), ("small", 100, 0.74))
    )
    found = verdict(rules, report(measured=asked))
    assert found.chosen == "big"
    assert found.candidates[1].reasons[0].text == (
        "answers 90.0 % of 40 of 60 questions as expected (interval 74.0 % to 97.0 %), needed 75 %"
    )
    assert "expected_accuracy is not in the report" in verdict(rules, report()).candidates[0].reasons[0].text
