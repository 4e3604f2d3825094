"""After a refusal: the file that came nearest, and for each rule that it broke what would meet it. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

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
from overproof.export.base import TEACHER
from overproof.files import FrozenModel
from overproof.registry import FORMATS, TASKS

SPARE_TIME = 1.2  # of requests, for the next run's may take longer
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


@dataclass(frozen=True)
class _Bound:
    """What a file has of a field of a rule, and whether more of it is worse."""

    field: str
    value: float
    at_most: bool


def passing_values(rule: Rule, report: Report, file: MeasuredFile) -> dict[str, float] | None:
    """The nearest values of a rule's fields that let a file pass, rounded to the side that does; None where none would,
    or where it is not known what the file has.
    """
    bounds = [bound for bound in _bounds(rule, report, file) if not _holds(bound, getattr(rule, bound.field))]
    for digits, steps in ((DIGITS, 0), (DIGITS, 1), (DIGITS + 3, 0), (DIGITS + 3, 1)):
        values = {bound.field: _round(bound, digits, steps) for bound in bounds}
        try:
            loosened = type(rule).model_validate(rule.model_dump() | values)
        except ValueError:  # a share of 0, a difference below 0
            continue
        if values and check_rule(loosened, report, file).passed:
            return values
    return None


def _holds(bound: _Bound, allowed: float) -> bool:
    return bound.value <= allowed if bound.at_most else bound.value > allowed


def _bounds(rule: Rule, report: Report, file: MeasuredFile) -> Iterator[_Bound]:
    """Nothing where the report does not say, or has no interval."""
    metrics, higher = file.metrics, TASKS[report.task].quality.higher_is_better
    match rule:
        case Regression() | Improvement():
            compared = report.compare(file.name, reference_name(rule, file.student))
            if compared is not None and compared.high is not None:
                worse = isinstance(rule, Regression)
                yield _Bound("at_most" if worse else "at_least", compared.high if worse else -compared.high, worse)
        case Keep():
            kept = kept_share(report, file, reference_name(rule, file.student))
            if kept is not None:
                yield _Bound("at_least", kept[1], at_most=False)
        case Quality():
            metric = metrics.get(report.quality)
            far = None if metric is None else metric.low if higher else metric.high
            if far is not None:
                yield _Bound("limit", far, at_most=not higher)
        case Smaller():
            reference = report.find(reference_name(rule, file.student))
            if reference is not None:
                yield _Bound("at_least", reference.size_bytes / file.size_bytes, at_most=False)
        case Size():
            yield _Bound("at_most_mb", file.size_bytes / 1e6, at_most=True)
        case Latency():
            metric = metrics.get(f"latency_p{rule.percentile}_s")
            if metric is not None and metric.high is not None:
                yield _Bound("at_most_ms", 1e3 * metric.high, at_most=True)
        case Agreement() | ExpectedAnswers():
            metric = metrics.get("agreement" if isinstance(rule, Agreement) else EXPECTED_ACCURACY)
            if metric is not None and metric.low is not None:
                yield _Bound("at_least", metric.low, at_most=False)
        case Parity():
            for field, name in (("at_most", "parity_nats"), ("split_otherwise", "split_otherwise")):
                if name in metrics:
                    yield _Bound(field, metrics[name].value, at_most=True)


def _missed(rule: Rule, report: Report, file: MeasuredFile) -> float:
    """By which share of its bounds a file misses a rule."""
    values = passing_values(rule, report, file)
    if values is None:
        return NO_VALUE
    allowed: dict[str, float] = {field: getattr(rule, field) for field in values}
    return sum(abs(value - allowed[field]) / (abs(allowed[field]) or 1.0) for field, value in values.items())


def _round(bound: _Bound, digits: int, steps: int) -> float:
    """To so many digits and so many further steps to the side that lets a file pass."""
    if bound.value == 0:
        return 0.0
    scale = 10.0 ** (math.floor(math.log10(abs(bound.value))) - digits + 1)
    scaled = bound.value / scale
    rounded = math.ceil(scaled) + steps if bound.at_most else math.floor(scaled) - steps
    return float(f"{rounded * scale:.10g}")


def _remedies(recipe: Recipe, report: Report, index: int, rule: Rule, file: MeasuredFile) -> Iterator[Remedy]:
    if not list(_bounds(rule, report, file)):
        yield _measured(recipe, report, rule, file)
        return
    if isinstance(rule, OF_QUALITY):
        yield from _better(recipe, report, rule, file)
    elif isinstance(rule, Size | Smaller):
        yield from _smaller(recipe, file)
    elif isinstance(rule, Latency):
        yield Remedy(text="a smaller student: fewer or narrower layers in sweep.students")
    else:
        yield Remedy(text="another format or engine: this one answers otherwise than the file says")
    yield from _others(recipe, report, rule, file)
    values = passing_values(rule, report, file)
    if values is None:
        yield Remedy(text="no value of this rule would let it pass")
    else:
        overrides = tuple(f"gate.rules.{index}.{field}={value:.10g}" for field, value in values.items())
        yield Remedy(text=f"this rule, at what {file.name} has", overrides=overrides)


def _measured(recipe: Recipe, report: Report, rule: Rule, file: MeasuredFile) -> Remedy:
    """What would have to be measured, where the report does not say what a rule asks."""
    if isinstance(rule, Latency):
        metric = file.metrics.get(f"latency_p{rule.percentile}_s")
        needed = fewest_values(rule.percentile / 100, report.confidence)
        seconds = math.ceil(recipe.evaluate.probe_s * needed / max(1, metric.n if metric else 1) * SPARE_TIME)
        return Remedy(text=f"time for {needed} requests", overrides=(f"evaluate.probe_s={seconds}",))
    if isinstance(rule, ExpectedAnswers):
        return Remedy(text="test records that say what is expected")
    return Remedy(text=f"more test {TASKS[report.task].test_unit}s: of one there is no interval")


MOST_FORMATS = 2  # to try at once


def _better(recipe: Recipe, report: Report, rule: Rule, file: MeasuredFile) -> Iterator[Remedy]:
    """What would make a file's quality better: a format that loses less, or more steps where training costs it."""
    whole = report.find(file.student) if file.student else None
    by_rounding = getattr(rule, "against", "teacher") == "student" or file.student == TEACHER
    if by_rounding or (whole is not None and check_rule(rule, report, whole).passed):
        untried = _untried(recipe, file, larger=True)
        if untried:
            yield Remedy(text="a format that loses less: rounding costs it", overrides=(_formats(recipe, untried),))
        else:
            yield Remedy(text="rounding costs it, and no format that loses less is left")
        return
    if recipe.train.steps and teacher_is_behind(report):
        yield longer_teacher(recipe)
    yield longer_students(recipe)


def longer_teacher(recipe: Recipe) -> Remedy:
    return Remedy(text="a teacher trained twice as long", overrides=(f"train.steps={2 * recipe.train.steps}",))


def longer_students(recipe: Recipe) -> Remedy:
    """With as many rows of the teacher's as they then read."""
    rows = {"cache.rows": recipe.cache.rows, "generate.rows": recipe.generate.rows if recipe.generate else None}
    more = (f"{field}={2 * count}" for field, count in rows.items() if isinstance(count, int))
    searched, steps = recipe.tune.space.steps, f"sweep.steps={2 * recipe.sweep.steps}"
    if searched is not None:
        steps = f"tune.space.steps={{kind: choice, values: {[2 * value for value in searched.values]}}}"
    return Remedy(text="students trained twice as long", overrides=(steps, *more))


def teacher_is_behind(report: Report) -> bool:
    """Whether the control, or the best student, is as good as the teacher or better."""
    found = [report.compare(name, "teacher") for name in ("control", report.winner)]
    return any(c is not None and c.value <= 0 for c in found)


def _smaller(recipe: Recipe, file: MeasuredFile) -> Iterator[Remedy]:
    untried = _untried(recipe, file, larger=False)
    if untried:
        yield Remedy(text="a smaller format", overrides=(_formats(recipe, untried),))
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
    """The next formats that are better than a file's, or smaller, and that the recipe does not write."""
    every = FORMATS[recipe.compress.kind].section.by_quality
    mix = file.format.partition("-")[0]
    place = next((i for i, each in enumerate(every) if each in (file.format, mix) or each.startswith(f"{mix}-")), None)
    if place is None:  # of no fixed place: the best there is
        there = every[:1] if larger else ()
    elif file.format in every:
        place = every.index(file.format)
        there = every[:place][::-1] if larger else every[place + 1 :]
    else:  # beside the one of the same mix that is worth trying
        there = every[: place + 1][::-1] if larger else every[place + 1 :]
    return [each for each in there if each not in recipe.compress.formats][:MOST_FORMATS]


def _formats(recipe: Recipe, more: list[str]) -> str:
    return f"compress.formats=[{','.join([*recipe.compress.formats, *more])}]"
