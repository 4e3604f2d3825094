"""`overproof pick`: of the files that passed the gate, the best within a budget, and why the others were left out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from overproof import pipeline
from overproof.artifacts import Store
from overproof.cli.recipe_arguments import RecipeArguments
from overproof.config import Recipe
from overproof.console import notice, out
from overproof.errors import InputError
from overproof.evaluate.gate import VERDICT, Verdict
from overproof.evaluate.metrics import REPORT, MeasuredFile, Report
from overproof.evaluate.outcome import contention
from overproof.files import read_json
from overproof.registry import TASKS
from overproof.tasks.base import QualityMetric
from overproof.units import format_number, format_percent


@dataclass(frozen=True)
class Limit:
    """One bound on a figure: at most (or, for accuracy, at least) ``bound``."""

    flag: str
    figure: str  # size_mb, or the name of a metric
    bound: float
    factor: float = 1.0  # from the metric's unit to the flag's
    at_least: bool = False

    def found(self, measured: MeasuredFile) -> float | None:
        """The figure in the flag's unit, None where it was not measured."""
        if self.figure == "size_mb":
            return measured.size_bytes / 1e6
        metric = measured.metrics.get(self.figure)
        return self.factor * metric.value if metric else None

    def excess(self, measured: MeasuredFile) -> float:
        """By which share of the bound the figure misses it; 0 or less keeps it, and what is not measured misses it."""
        found = self.found(measured)
        if found is None:
            return math.inf
        return (self.bound - found if self.at_least else found - self.bound) / self.bound

    def __str__(self) -> str:
        return f"{self.flag} {self.bound:g}"


@dataclass(frozen=True)
class Budget:
    """What the command line asks for; None asks for nothing."""

    max_mb: float | None = None
    max_p50_ms: float | None = None
    max_p95_ms: float | None = None
    max_resident_mb: float | None = None
    min_quality: float | None = None

    def limits(self, quality: QualityMetric) -> tuple[Limit, ...]:
        """The limits that are set.

        Raises:
            InputError: one is not a positive number, or an accuracy is above 1.
        """
        every = (
            ("--max-mb", "size_mb", self.max_mb, 1.0, False),
            ("--max-p50-ms", "latency_p50_s", self.max_p50_ms, 1e3, False),
            ("--max-p95-ms", "latency_p95_s", self.max_p95_ms, 1e3, False),
            ("--max-resident-mb", "resident_mb", self.max_resident_mb, 1.0, False),
            ("--min-quality", quality.name, self.min_quality, 1.0, quality.higher_is_better),
        )
        for flag, _, bound, _, share in every:
            if bound is not None and not (0 < bound < math.inf and (bound <= 1 or not share)):
                raise InputError(
                    f"{flag}: found {bound:g}; expected {'a share of up to 1' if share else 'a number above 0'}"
                )
        return tuple(
            Limit(flag, figure, bound, factor, at_least)
            for flag, figure, bound, factor, at_least in every
            if bound is not None
        )


@dataclass(frozen=True)
class Candidate:
    """One candidate: out for these reasons, or within every limit where there are none."""

    measured: MeasuredFile
    refused: bool  # by the gate
    exceeded: tuple[Limit, ...]

    @property
    def fits(self) -> bool:
        return not self.refused and not self.exceeded

    @property
    def excess(self) -> float:
        """The share by which it misses the limit it is furthest from."""
        return max((limit.excess(self.measured) for limit in self.exceeded), default=0.0)


def rank_candidates(report: Report, verdict: Verdict, limits: Sequence[Limit]) -> tuple[Candidate, ...]:
    """Every candidate: those that fit first, the best quality first, then the smaller file."""
    passed = {c.name: c.passed for c in verdict.candidates}
    quality = TASKS[report.task].quality
    choices = (
        Candidate(m, not passed[m.name], tuple(limit for limit in limits if limit.excess(m) > 0))
        for m in report.measured
        if m.candidate
    )

    def rank(choice: Candidate) -> tuple[bool, float, int, str]:
        m = choice.measured
        return not choice.fits, quality.sort_key(m.metrics[report.quality].value), m.size_bytes, m.name

    return tuple(sorted(choices, key=rank))


def select(recipe: Recipe, arguments: RecipeArguments, budget: Budget) -> int:
    """Print every candidate, the one to take and the command that packages it. Returns the exit code: 1, nothing fits.

    Raises:
        InputError: a limit makes no sense, or the recipe's files were not measured and judged yet.
    """
    done = {s.stage.name: s.artifact for s in pipeline.resolve_stages(recipe, Store(recipe.store), "gate")}
    if not (done["evaluate"] and done["gate"]):
        raise InputError(f"{recipe.name}: nothing is measured and judged yet; run `overproof gate {arguments}` first")
    report = read_json(Report, done["evaluate"].local() / REPORT)
    limits = budget.limits(TASKS[report.task].quality)
    choices = rank_candidates(report, read_json(Verdict, done["gate"].local() / VERDICT), limits)
    out.print(_table(recipe.name, report, choices))
    if budget.max_p50_ms is not None or budget.max_p95_ms is not None:
        for warning in contention(report):
            notice(warning)
    best = choices[0] if choices else None
    if best is None or not best.fits:
        out.print(_closest_text(choices))
        return 1
    out.print(f"{best.measured.name} is the best within the limits; this packages it:")
    out.print(f"overproof package {arguments.with_overrides(f'gate.candidate={best.measured.name}')}", markup=False)
    return 0


def _table(name: str, report: Report, choices: Sequence[Candidate]) -> Table:
    table = Table(
        "candidate", TASKS[report.task].quality.title, "MB", "p50 ms", "p95 ms", "resident MB", "", title=name
    )
    for i, choice in enumerate(choices):
        m = choice.measured
        outcome = "[green]taken[/]" if i == 0 and choice.fits else "" if choice.fits else f"[red]{_reasons(choice)}[/]"
        milliseconds = (format_number(1e3 * m.metrics[f"latency_p{share}_s"].value) for share in (50, 95))
        table.add_row(
            m.name,
            f"{m.metrics[report.quality].value:.4f}",
            f"{m.size_bytes / 1e6:.2f}",
            *milliseconds,
            f"{m.metrics['resident_mb'].value:.0f}",
            outcome,
        )
    return table


def _reasons(choice: Candidate) -> str:
    reasons = ["the gate refused it"] if choice.refused else []
    return "; ".join(
        reasons + [f"{limit} missed by {format_percent(limit.excess(choice.measured))}" for limit in choice.exceeded]
    )


def _closest_text(choices: Sequence[Candidate]) -> str:
    passed = [choice for choice in choices if not choice.refused]
    if not passed:
        return "nothing fits: the gate refused every candidate"
    closest = min(passed, key=lambda choice: choice.excess)
    missed = []
    for limit in closest.exceeded:
        found = limit.found(closest.measured)
        measured = "was not measured" if found is None else f"has {format_number(found, 4)}"
        missed.append(f"{measured} where {limit} was asked for")
    return f"nothing fits; the closest is {closest.measured.name}, which {', and '.join(missed)}"
