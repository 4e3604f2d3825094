"""After a refusal: the file that came nearest, and for each rule that it broke what would meet it. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from overproof.config import (
    Agreement,
    ExpectedAnswers,
    Improvement,
    Keep,
    Latency,
    Parity,
    Quality,
    Recipe,
    Regression,
    Rule,
    Size,
    Smaller,
)
from overproof.engines.order_statistics import fewest_values
from overproof.evaluate.gate import Verdict, check_rule, kept_share, reference_name
from overproof.evaluate.metrics import EXPECTED_ACCURACY, MeasuredFile, Report
from overproof.files import FrozenModel
from overproof.registry import FORMATS, TASKS

NO_VALUE = 1.0  # how far off a file counts that breaks a rule which no value of it would let pass
DIGITS = 3  # of a value that is suggested
OF_QUALITY = (Regression, Improvement, Keep, Quality, Agreement, ExpectedAnswers)  # what training can change


class Remedy(FrozenModel):
    """One way to meet a rule, and the overrides of the recipe that take it; none where it is no setting."""

    text: str
    overrides: tuple[str, ...] = ()


class BrokenRule(FrozenModel):
    """What a rule found, as the verdict says it, and what would meet it."""

    kind: str
    text: str
    remedies: tuple[Remedy, ...]


class Nearest(FrozenModel):
    """A file that was refused."""

    name: str
    broken: tuple[BrokenRule, ...]


@dataclass(frozen=True)
class Bound:
    """A rule's field, and the value of it at which a file would just pass."""

    field: str
    value: float


def find_nearest(recipe: Recipe, report: Report, verdict: Verdict) -> Nearest | None:
    """The refused file that misses its rules by least, in shares of their bounds, or the one that the policy names.

    None where nothing was judged.
    """
    judged = []
    for candidate in verdict.candidates:
        file = report.find(candidate.name)
        assert file is not None
        broken = [
            (index, rule, reason.text)
            for index, (rule, reason) in enumerate(zip(recipe.gate.rules, candidate.reasons, strict=True))
            if not reason.passed
        ]
        if broken and recipe.gate.candidate in (None, file.name):
            judged.append((sum(_missed(rule, report, file) for _, rule, _ in broken), file, broken))
    if not judged:
        return None
    _, file, broken = min(judged, key=lambda found: (found[0], found[1].name))
    return Nearest(
        name=file.name,
        broken=tuple(
            BrokenRule(kind=rule.kind, text=text, remedies=tuple(_remedies(recipe, report, index, rule, file)))
            for index, rule, text in broken
        ),
    )


def passing_bound(rule: Rule, report: Report, file: MeasuredFile) -> Bound | None:
    """The nearest value of a rule that lets a file pass, rounded to the side that does; None where none would."""
    found = _found(rule, report, file)
    if found is None:
        return None
    field, value, at_most = found
    for digits in (DIGITS, DIGITS + 3):
        rounded = _round(value, digits, up=at_most)
        changed = rule.model_dump() | {field: rounded}
        try:
            loosened = type(rule).model_validate(changed)
        except ValueError:  # a share of 0, a difference below 0
            return None
        if check_rule(loosened, report, file).passed:
            return Bound(field, rounded)
    return None


def _found(rule: Rule, report: Report, file: MeasuredFile) -> tuple[str, float, bool] | None:
    """The field that bounds a file, what the file has of it, and whether more of it is worse."""
    metrics, higher = file.metrics, TASKS[report.task].quality.higher_is_better
    match rule:
        case Regression() | Improvement():
            compared = report.compare(file.name, reference_name(rule, file.student))
            if compared is None or compared.high is None:
                return None
            regression = isinstance(rule, Regression)
            return ("at_most", max(0.0, compared.high), True) if regression else ("at_least", -compared.high, False)
        case Keep():
            kept = kept_share(report, file, reference_name(rule, file.student))
            return None if kept is None else ("at_least", min(1.0, kept[1]), False)
        case Quality():
            metric = metrics.get(report.quality)
            far = None if metric is None else metric.low if higher else metric.high
            return None if far is None else ("limit", far, not higher)
        case Smaller():
            reference = report.find(reference_name(rule, file.student))
            return None if reference is None else ("at_least", reference.size_bytes / file.size_bytes, False)
        case Size():
            return "at_most_mb", file.size_bytes / 1e6, True
        case Latency():
            metric = metrics.get(f"latency_p{rule.percentile}_s")
            return None if metric is None or metric.high is None else ("at_most_ms", 1e3 * metric.high, True)
        case Agreement() | ExpectedAnswers():
            metric = metrics.get("agreement" if isinstance(rule, Agreement) else EXPECTED_ACCURACY)
            return None if metric is None or metric.low is None else ("at_least", metric.low, False)
        case Parity():
            metric, split = metrics.get("parity_nats"), metrics.get("split_otherwise")
            if metric is None or metric.value > rule.at_most:
                return None if metric is None else ("at_most", metric.value, True)
            return None if split is None else ("split_otherwise", split.value, True)


def _missed(rule: Rule, report: Report, file: MeasuredFile) -> float:
    """By which share of its bound a file misses a rule."""
    found = passing_bound(rule, report, file)
    if found is None:
        return NO_VALUE
    bound: float = getattr(rule, found.field)
    return abs(found.value - bound) / (abs(bound) or 1.0)


def _round(value: float, digits: int, up: bool) -> float:
    """To so many digits, never past the value on its own side."""
    if value == 0:
        return 0.0
    scale = 10.0 ** (math.floor(math.log10(abs(value))) - digits + 1)
    return float(f"{(math.ceil if up else math.floor)(value / scale) * scale:.10g}")


def _remedies(recipe: Recipe, report: Report, index: int, rule: Rule, file: MeasuredFile) -> Iterator[Remedy]:
    if isinstance(rule, OF_QUALITY):
        yield from _better(recipe, report, rule, file)
    elif isinstance(rule, Size | Smaller):
        yield from _smaller(recipe, file)
    elif isinstance(rule, Latency):
        yield from _timed(recipe, report, rule, file)
    else:
        yield Remedy(
            text="the engine answers otherwise than the file says: another format or engine, or a fault to report"
        )
    yield from _others(recipe, report, rule, file)
    bound = passing_bound(rule, report, file)
    if bound is None:
        yield Remedy(text="no value of this rule would let it pass")
    else:
        yield Remedy(
            text=f"this rule, at what {file.name} has",
            overrides=(f"gate.rules.{index}.{bound.field}={bound.value:.10g}",),
        )


def _better(recipe: Recipe, report: Report, rule: Rule, file: MeasuredFile) -> Iterator[Remedy]:
    """What would make a file's quality better: more bits where rounding costs it, more steps where training does."""
    whole = report.find(file.student) if file.student else None
    if whole is not None and check_rule(rule, report, whole).passed:
        untried = _untried(recipe, file, larger=True)
        if untried:
            yield Remedy(text="more bits: unquantised it holds this rule", overrides=(_formats(recipe, untried),))
        else:
            yield Remedy(text="rounding costs it: unquantised it holds this rule, and no format of more bits is left")
        return
    doubled = (f"sweep.steps={2 * recipe.sweep.steps}",) if recipe.sweep.steps else ()
    if recipe.train.steps and teacher_is_behind(report):
        yield Remedy(
            text="a better teacher, trained twice as long", overrides=(f"train.steps={2 * recipe.train.steps}",)
        )
    yield Remedy(text="students that train twice as long", overrides=doubled)


def teacher_is_behind(report: Report) -> bool:
    """Whether the control, or the best student, is as good as the teacher or better."""
    found = [report.compare(name, "teacher") for name in ("control", report.winner)]
    return any(c is not None and c.value <= 0 for c in found)


def _smaller(recipe: Recipe, file: MeasuredFile) -> Iterator[Remedy]:
    untried = _untried(recipe, file, larger=False)
    if untried:
        yield Remedy(text="fewer bits", overrides=(_formats(recipe, untried),))
    yield Remedy(text="a smaller student: fewer or narrower layers in sweep.students")


def _timed(recipe: Recipe, report: Report, rule: Latency, file: MeasuredFile) -> Iterator[Remedy]:
    metric = file.metrics.get(f"latency_p{rule.percentile}_s")
    needed = fewest_values(rule.percentile / 100, report.confidence)
    if metric is not None and metric.high is None and metric.n < needed:
        seconds = math.ceil(recipe.evaluate.probe_s * needed / max(1, metric.n) * 1.2)
        yield Remedy(text=f"time for {needed} requests", overrides=(f"evaluate.probe_s={seconds}",))
        return
    yield Remedy(text="a smaller student: fewer or narrower layers in sweep.students")


def _others(recipe: Recipe, report: Report, rule: Rule, file: MeasuredFile) -> Iterator[Remedy]:
    """The smallest other candidate that holds this rule, and what speaks against it."""
    holding = [m for m in report.measured if m.candidate and m is not file and check_rule(rule, report, m).passed]
    if not holding:
        return
    other = min(holding, key=lambda m: (m.size_bytes, m.name))
    broken = [each.kind for each in recipe.gate.rules if not check_rule(each, report, other).passed]
    if broken:
        yield Remedy(text=f"{other.name} holds this rule, and breaks {', '.join(broken)}")
    else:
        yield Remedy(text=f"{other.name}, which met every rule", overrides=(f"gate.candidate={other.name}",))


def _untried(recipe: Recipe, file: MeasuredFile, larger: bool) -> list[str]:
    """Formats of more bits than a file's, or of fewer, that the recipe does not write. Sections list theirs from the
    largest to the smallest.
    """
    every: list[Any] = list(FORMATS[recipe.compress.kind].section.model_fields["formats"].default)
    if file.format not in every:
        return []
    place = every.index(file.format)
    there = every[:place] if larger else every[place + 1 :]
    return [each for each in there if each not in recipe.compress.formats]


def _formats(recipe: Recipe, more: list[str]) -> str:
    return f"compress.formats=[{','.join([*recipe.compress.formats, *more])}]"
