"""What `pick` takes, leaves out and says."""

from __future__ import annotations

import shlex
from typing import Any

import pytest

from finished import RECIPES, Run
from overproof.artifacts import Store
from overproof.cli.main import main
from overproof.cli.select import Budget, Candidate, rank_candidates
from overproof.config import load_recipe
from overproof.errors import InputError
from overproof.evaluate.gate import CandidateVerdict, Verdict
from overproof.evaluate.metrics import MeasuredFile, Report
from overproof.files import read_json
from overproof.pipeline import resolve_stages
from overproof.registry import TASKS
from overproof.tasks.base import Metric, QualityMetric
from overproof.units import format_number

DIGITS = str(RECIPES / "digits.yaml")
SIZES_MB = {"big": 40.0, "middle": 20.0, "small": 10.0, "bad": 1.0}
TASK = {"bits_per_byte": "language_modeling", "accuracy": "image_classification"}
QUALITY = {"big": 2.0, "middle": 2.1, "small": 2.2, "bad": 9.0}


def measured(name: str, quality: str, value: float) -> MeasuredFile:
    def metric(value: float) -> Metric:
        return Metric(value=value, unit="any", n=10)

    size_mb = SIZES_MB[name]
    figures = {"latency_p50_s": size_mb / 1e3, "latency_p95_s": 2 * size_mb / 1e3, "resident_mb": 100 + size_mb}
    return MeasuredFile(
        name=name, student=name[0], format="any", size_bytes=int(size_mb * 1e6), sha256="0" * 64, candidate=True,
        metrics={quality: metric(value), **{figure: metric(value) for figure, value in figures.items()}},
    )  # fmt: skip


def judged(quality: str) -> QualityMetric:
    return TASKS[TASK[quality]].quality


def chosen(budget: Budget, quality: Any = "bits_per_byte") -> tuple[Candidate, ...]:
    values = QUALITY if quality == "bits_per_byte" else {name: 1 - q / 10 for name, q in QUALITY.items()}
    report = Report(
        task=TASK[quality],
        quality=quality,
        engine="any",
        computes_with="any",
        confidence=0.95,
        measured=tuple(measured(name, quality, value) for name, value in values.items()),
        comparisons=(),
    )
    verdicts = tuple(CandidateVerdict(name=name, passed=name != "bad", reasons=()) for name in QUALITY)
    return rank_candidates(
        report, Verdict(passed=True, chosen="small", candidates=verdicts), budget.limits(judged(quality))
    )


@pytest.mark.parametrize(
    ("budget", "taken"),
    [
        (Budget(), "big"),
        (Budget(max_mb=39.9), "middle"),
        (Budget(max_mb=20), "middle"),  # a limit may be met exactly
        (Budget(max_p50_ms=19), "small"),
        (Budget(max_p95_ms=40), "middle"),
        (Budget(max_resident_mb=110, max_mb=30), "small"),
        (Budget(max_mb=5), None),  # the only one so small did not pass
        (Budget(max_mb=15, min_quality=2.15), None),
        (Budget(min_quality=2.15), "big"),
    ],
)
@pytest.mark.parametrize("quality", ["bits_per_byte", "accuracy"])
def test_the_best_that_passed_and_fits_is_taken(budget: Budget, taken: str | None, quality: str) -> None:
    if quality == "accuracy" and budget.min_quality is not None:
        budget = Budget(**vars(budget) | {"min_quality": 1 - budget.min_quality / 10})
    first = chosen(budget, quality)[0]
    assert (first.measured.name if first.fits else None) == taken


def test_every_other_has_its_reasons() -> None:
    found = {c.measured.name: c for c in chosen(Budget(max_mb=20, max_p95_ms=30))}
    assert found["small"].fits
    assert found["bad"].refused
    assert [str(limit) for limit in found["big"].exceeded] == ["--max-mb 20", "--max-p95-ms 30"]
    assert found["big"].excess == pytest.approx(80 / 30 - 1)
    assert found["middle"].excess == pytest.approx(1 / 3)


@pytest.mark.parametrize("bound", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["max_mb", "max_p50_ms", "max_p95_ms", "max_resident_mb", "min_quality"])
def test_a_limit_that_makes_no_sense_is_refused(name: str, bound: float) -> None:
    with pytest.raises(InputError, match=f"--{name.replace('_', '-')}: found .*; expected a number above 0"):
        Budget(**{name: bound}).limits(judged("bits_per_byte"))
    with pytest.raises(InputError, match="share of up to 1"):
        Budget(min_quality=1.5).limits(judged("accuracy"))


def test_the_command_that_is_named_packages_what_was_picked(digits: Run, capsys: pytest.CaptureFixture[str]) -> None:
    own = ["--set", f"store={digits.recipe.store}"]
    report = read_json(Report, digits.artifacts["evaluate"].local() / "report.json")
    assert main(["pick", DIGITS, *own]) == 0
    said = capsys.readouterr().out
    for candidate in (m for m in report.measured if m.candidate):
        assert f"│ {candidate.name} " in said
    command = shlex.split(said.splitlines()[-1])
    recipe = load_recipe(command[2], tuple(command[4::2]))
    todo = [s.stage.name for s in resolve_stages(recipe, Store(recipe.store)) if s.artifact is None]
    assert command[:2] == ["overproof", "package"]
    assert todo == ["gate", "report", "package"]
    name = recipe.gate.candidate
    assert f"{name} is the best within the limits" in said

    assert main(["pick", DIGITS, *own, "--max-mb", "0.001"]) == 1
    said = capsys.readouterr().out
    smallest = min((m for m in report.measured if m.candidate), key=lambda m: m.size_bytes)
    has = format_number(smallest.size_bytes / 1e6, 4)
    assert f"the closest is {smallest.name}, which has {has} where --max-mb 0.001" in said
    assert said.count("--max-mb 0.001 missed by") == sum(m.candidate for m in report.measured)


def test_a_bad_limit_and_a_recipe_that_is_not_measured_end_with_2(
    digits: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ["--set", f"store={digits.recipe.store}"]
    assert main(["pick", DIGITS, *own, "--max-mb", "-3"]) == 2
    assert "--max-mb: found -3; expected a number above 0" in capsys.readouterr().err
    assert main(["pick", DIGITS, *own, "--set", "sweep.learning_rate=0.5"]) == 2
    assert "run `overproof gate" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["pick", DIGITS, "--max-mb", "many"])
    assert ended.value.code == 2
