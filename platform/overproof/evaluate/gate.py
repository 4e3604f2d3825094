"""The policy: does a compressed file pass, and why. Pure.

Every rule looks at the end of the interval that speaks against the candidate, so a measurement that is too
uncertain cannot pass. A figure that the report lacks fails its rule.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import assert_never

from overproof.config import (
    Agreement,
    ExpectedAnswers,
    Gate,
    Improvement,
    Keep,
    Latency,
    Parity,
    Quality,
    Regression,
    Rule,
    Size,
    Smaller,
)
from overproof.engines.order_statistics import fewest_values
from overproof.errors import InputError
from overproof.evaluate.metrics import EXPECTED_ACCURACY, Comparison, MeasuredFile, Report
from overproof.files import FrozenModel
from overproof.registry import TASKS
from overproof.tasks.base import Metric, QualityMetric
from overproof.units import format_count, format_latency, format_number

VERDICT = "verdict.json"  # where a verdict lies in an artifact or a package


class Reason(FrozenModel):
    """What one rule found, in words with figures."""

    rule: str
    passed: bool
    text: str


class CandidateVerdict(FrozenModel):
    """One compressed file: it passes when every rule does. Whatever the rules ask, first comes what it lost."""

    name: str
    passed: bool
    lost: str = ""  # against the teacher, in words; empty where the file is the teacher's own, or an older version's
    reasons: tuple[Reason, ...]

    @property
    def lines(self) -> tuple[str, ...]:
        """What it lost, and what each rule found."""
        return tuple(filter(None, (self.lost, *(reason.text for reason in self.reasons))))


class Verdict(FrozenModel):
    """``passed`` when a candidate may be packaged: ``chosen`` is the one the policy names, else the smallest."""

    passed: bool
    chosen: str | None
    candidates: tuple[CandidateVerdict, ...]


def judge(gate: Gate, report: Report) -> Verdict:
    """Hold every candidate of a report against every rule.

    Raises:
        InputError: the policy names a candidate that there is not.
    """
    candidates = [m for m in report.measured if m.candidate]
    verdicts = tuple(_judge_one(gate, report, candidate) for candidate in candidates)
    names = [m.name for m in candidates]
    if gate.candidate is not None and gate.candidate not in names:
        raise InputError(f"gate.candidate: found {gate.candidate!r}; expected one of {', '.join(names)}")
    passing = [
        m
        for m, verdict in zip(candidates, verdicts, strict=True)
        if verdict.passed and gate.candidate in (None, m.name)
    ]
    chosen = min(passing, key=lambda m: (m.size_bytes, m.name)).name if passing else None
    return Verdict(passed=chosen is not None, chosen=chosen, candidates=verdicts)


def _judge_one(gate: Gate, report: Report, candidate: MeasuredFile) -> CandidateVerdict:
    reasons = tuple(check_rule(rule, report, candidate) for rule in gate.rules)
    title, loss = TASKS[report.task].quality.title, teacher_loss(report, candidate.name)
    return CandidateVerdict(
        name=candidate.name,
        passed=all(r.passed for r in reasons),
        lost=f"{title} against the teacher: {loss or 'not measured'}",
        reasons=reasons,
    )


def teacher_loss(report: Report, name: str) -> str:
    """What a file lost against the teacher, or gained, such as ``1.40 % worse (1.10 to 1.70 %)``; empty where that was
    not measured.
    """
    found, quality = report.compare(name, "teacher"), TASKS[report.task].quality
    if found is None:
        return ""
    if found.low is None or found.high is None:
        return f"{_amount(found, quality)} (no interval)"
    return f"{_amount(found, quality)} ({_ends(found.low, found.high, found.value > 0)} {quality.difference_unit})"


def check_rule(rule: Rule, report: Report, candidate: MeasuredFile) -> Reason:
    """What one rule finds of one file."""
    match rule:
        case Regression() | Improvement():
            passed, text = _compared(rule, report, candidate)
        case Keep():
            passed, text = _keep(rule, report, candidate)
        case Quality():
            passed, text = _quality(rule, report, candidate)
        case Smaller():
            passed, text = _smaller(rule, report, candidate)
        case Size():
            found_mb = candidate.size_bytes / 1e6
            passed, text = found_mb <= rule.at_most_mb, f"{found_mb:.4g} MB, allowed {rule.at_most_mb:g} MB"
        case Latency():
            passed, text = _latency(rule, report.confidence, candidate)
        case Agreement():
            passed, text = _agreement(rule, candidate)
        case Parity():
            passed, text = _parity(rule, candidate)
        case ExpectedAnswers():
            passed, text = _expected(rule, candidate)
        case _:
            assert_never(rule)
    return Reason(rule=rule.kind, passed=passed, text=text)


def _compared(rule: Regression | Improvement, report: Report, candidate: MeasuredFile) -> tuple[bool, str]:
    against, quality = reference_name(rule, candidate.student), TASKS[report.task].quality
    found = report.compare(candidate.name, against)
    if found is None:
        return False, f"{quality.title} against {against} is not in the report"
    if found.low is None or found.high is None:
        return False, f"{quality.title} against {against} has no interval: more than one test unit is needed"
    text = f"{quality.title} {_difference(found, quality)}"
    if isinstance(rule, Regression):
        return found.high <= rule.at_most, f"{text}, allowed {quality.amount(rule.at_most)}"
    return -found.high > rule.at_least, f"{text}, must be better by more than {quality.amount(rule.at_least)}"


def kept_share(report: Report, candidate: MeasuredFile, against: str) -> tuple[float, float] | None:
    """Which share of a reference's quality a file keeps, and the same at the far end of the interval; None where the
    report has no such interval.
    """
    found = report.compare(candidate.name, against)
    if found is None or found.kept is None or found.kept_low is None:
        return None
    return found.kept, found.kept_low


def _keep(rule: Keep, report: Report, candidate: MeasuredFile) -> tuple[bool, str]:
    against, quality = reference_name(rule, candidate.student), TASKS[report.task].quality
    kept = kept_share(report, candidate, against)
    if kept is None:
        return False, f"what it keeps of {against}'s {quality.title} is not in the report, or has no interval"
    value, low = kept
    what, times = quality.title, ""
    if not quality.higher_is_better and value > 0:
        what, times = "quality", f"{1 / value:.3f} times its {quality.title}; "
    text = f"keeps {100 * value:.1f} % of {against}'s {what} ({times}at the far end of the interval {100 * low:.1f} %)"
    return low >= rule.at_least, f"{text}, needed {100 * rule.at_least:g} %"


def _quality(rule: Quality, report: Report, candidate: MeasuredFile) -> tuple[bool, str]:
    quality, found = TASKS[report.task].quality, candidate.metrics.get(report.quality)
    if found is None or found.low is None or found.high is None:
        return False, f"{quality.title} is not in the report, or has no interval"
    far, needed = (found.low, "least") if quality.higher_is_better else (found.high, "most")
    passed = far >= rule.limit if quality.higher_is_better else far <= rule.limit
    interval = f"interval {found.low:.4g} to {found.high:.4g}"
    return passed, f"{quality.title} {found.value:.4g} ({interval}), needed at {needed} {rule.limit:g}"


def requests_needed(rules: Iterable[Rule], confidence: float) -> int:
    """As many timed requests of a file as its latency rules can be shown with; 0 without such a rule."""
    needed = (fewest_values(rule.percentile / 100, confidence) for rule in rules if isinstance(rule, Latency))
    return max(needed, default=0)


def _latency(rule: Latency, confidence: float, candidate: MeasuredFile) -> tuple[bool, str]:
    found, name = candidate.metrics.get(f"latency_p{rule.percentile}_s"), f"p{rule.percentile} latency"
    if found is None:
        return False, f"{name} is not in the report"
    if found.high is None:
        needed = requests_needed([rule], confidence)
        return False, f"{name} not shown: {format_count(found.n, 'request')}, needs {needed}: raise evaluate.probe_s"
    text = f"{name} {format_latency(found.value)}, at most {format_latency(found.high)}"
    requests = format_count(found.n, "request")
    return 1e3 * found.high <= rule.at_most_ms, f"{text} ({requests}), allowed {format_latency(rule.at_most_ms / 1e3)}"


def reference_name(rule: Regression | Improvement | Keep | Smaller, student: str | None) -> str:
    """The export a rule holds a student's candidate against: its own unquantised file, the teacher or the control."""
    return student or rule.against if rule.against == "student" else rule.against


def _smaller(rule: Smaller, report: Report, candidate: MeasuredFile) -> tuple[bool, str]:
    against = reference_name(rule, candidate.student)
    reference = report.find(against)
    if reference is None:
        return False, f"the size of {against} is not in the report"
    times = reference.size_bytes / candidate.size_bytes
    return times >= rule.at_least, f"{times:.2f} times smaller than {against}, needed {rule.at_least:g} times"


def _agreement(rule: Agreement, candidate: MeasuredFile) -> tuple[bool, str]:
    found: Metric | None = candidate.metrics.get("agreement")
    if found is None:
        return False, "agreement with teacher is not in the report"
    if found.low is None or found.high is None:
        return False, "agreement with teacher has no interval: more than one test unit is needed"
    interval = f"{100 * found.low:.1f} % to {100 * found.high:.1f} %"
    text = f"agrees with teacher on {100 * found.value:.1f} % (interval {interval}), needed {100 * rule.at_least:g} %"
    return found.low >= rule.at_least, text


def _parity(rule: Parity, candidate: MeasuredFile) -> tuple[bool, str]:
    found = candidate.metrics.get("parity_nats")
    if found is None:
        return False, "parity_nats of the serving engine is not in the report"
    difference = f"{format_number(found.value, 2)} nats of the reference"
    text = f"serving engine within {difference} ({found.n} probed), allowed {rule.at_most:g}"
    split = candidate.metrics.get("split_otherwise")  # of text alone
    if split is None:
        return found.value <= rule.at_most, text
    text += (
        f"; it splits {100 * split.value:.3g} % of {format_count(split.n, 'test document')} into other tokens than "
        f"tokenizer.json, allowed {100 * rule.split_otherwise:g} %"
    )
    return found.value <= rule.at_most and split.value <= rule.split_otherwise, text


def _expected(rule: ExpectedAnswers, candidate: MeasuredFile) -> tuple[bool, str]:
    found = candidate.metrics.get(EXPECTED_ACCURACY)
    if found is None or found.low is None or found.high is None:
        return False, f"{EXPECTED_ACCURACY} is not in the report: no test record says what is expected"
    interval = f"interval {100 * found.low:.1f} % to {100 * found.high:.1f} %"
    text = f"answers {100 * found.value:.1f} % of {found.measured_on} questions as expected ({interval})"
    return found.low >= rule.at_least, f"{text}, needed {100 * rule.at_least:g} %"


def _difference(found: Comparison, quality: QualityMetric) -> str:
    """Such as ``1.40 % worse than student (interval 1.10 to 1.70 %)``; a negative end means the other direction."""
    assert found.low is not None
    assert found.high is not None
    interval = f"interval {_ends(found.low, found.high, found.value > 0)} {quality.difference_unit}"
    return f"{_amount(found, quality)} than {found.against} ({interval})"


def _amount(found: Comparison, quality: QualityMetric) -> str:
    worse, better = quality.comparatives
    return f"{100 * abs(found.value):.2f} {quality.difference_unit} {worse if found.value > 0 else better}"


def _ends(low: float, high: float, worse: bool) -> str:
    near, far = (low, high) if worse else (0.0 - high, 0.0 - low)
    near, far = (0.0 if abs(end) < 5e-5 else end for end in (near, far))
    return f"{100 * near:.2f} to {100 * far:.2f}"
