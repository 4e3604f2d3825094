"""What came of a run, in sentences that hold in every case: what ships and why, what it lost, what distillation bought,
where a comparison is hollow, and what to do next. Pure, but for ``read_training``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from overproof.artifacts import Artifact
from overproof.config import Recipe, Student, Sweep
from overproof.config.search import apply_values
from overproof.evaluate.gate import Verdict
from overproof.evaluate.metrics import Comparison, MeasuredFile, Report
from overproof.evaluate.remedies import (
    Nearest,
    Remedy,
    find_nearest,
    longer_students,
    longer_teacher,
    teacher_is_behind,
)
from overproof.files import FrozenModel
from overproof.registry import TASKS
from overproof.tasks.base import Metric
from overproof.units import format_count

OUTCOME = "outcome.json"  # where it lies in the gate's artifact
FEW_UNITS = 30  # below which intervals by resampling are themselves uncertain (Hesterberg, arXiv 1411.5279)
STEEP = 0.05  # of a loss, that the last quarter of its steps took away
LAST_STEPS = 0.75  # where that quarter begins
CONTENDED_CORES = 0.3  # cores that the engine's threads lacked while latencies were measured

Curve = tuple[tuple[int, float], ...]  # steps and losses, from the first to the last


@dataclass(frozen=True)
class Training:
    """How the measured files came to be: curves of the teacher, trials and the control, and whether the best student
    learnt from the teacher.
    """

    curves: Mapping[str, Curve]
    taught: bool = True


class Outcome(FrozenModel):
    """Each a sentence; ``lost`` and ``bought`` are empty where nothing was compared."""

    passed: bool
    ships: str
    lost: str
    bought: str
    warnings: tuple[str, ...]
    nearest: Nearest | None  # where nothing ships
    next_steps: tuple[Remedy, ...]  # where something does: what would make it better known

    @property
    def sentences(self) -> tuple[str, ...]:
        """What ships, what it lost, what distillation bought."""
        return tuple(each for each in (self.ships, self.lost, self.bought) if each)


def find_outcome(recipe: Recipe, report: Report, verdict: Verdict, training: Training) -> Outcome:
    """What came of a run."""
    nearest = None if verdict.passed else find_nearest(recipe, report, verdict)
    subject = report.find(verdict.chosen or (nearest.name if nearest else report.winner))
    assert subject is not None
    steep = _steep_curves(report, training.curves)
    return Outcome(
        passed=verdict.passed,
        ships=_ships(recipe, report, verdict, nearest),
        lost=_lost(report, subject),
        bought=_bought(report, training.taught, subject),
        warnings=(
            *_hollow_teacher(report),
            *_under_way(steep),
            *_uncertain(report, subject),
            *contention(report),
        ),
        nearest=nearest,
        next_steps=tuple(_next_steps(recipe, report, steep)) if verdict.passed else (),
    )


def _ships(recipe: Recipe, report: Report, verdict: Verdict, nearest: Nearest | None) -> str:
    passing = [c.name for c in verdict.candidates if c.passed]
    count, named = len(verdict.candidates), recipe.gate.candidate
    files = format_count(count, "file")
    if verdict.chosen is None:
        if not count:
            return "Nothing ships: there is no file that may be packaged."
        if named is not None and nearest is not None:
            others = f"; {_list(passing)} met every rule" if passing else ""
            return f"Nothing ships: gate.candidate names {named}, which broke {_kinds(nearest)}{others}."
        told = f"the nearest, {nearest.name}, broke {_kinds(nearest)}" if nearest else "each broke one"
        subject = "the one file there is did not meet" if count == 1 else f"none of {files} met"
        return f"Nothing ships: {subject} every rule; {told}."
    if named is not None:
        return f"{verdict.chosen} ships: gate.candidate names it, and it met every rule."
    if count == 1:
        return f"{verdict.chosen} ships: the one file there is met every rule."
    if len(passing) == 1:
        return f"{verdict.chosen} ships: the only one of {files} that met every rule."
    sizes = {m.name: m.size_bytes for m in report.measured}
    equal = [name for name in passing if name != verdict.chosen and sizes[name] == sizes[verdict.chosen]]
    tie = f" (as small as {_list(equal)}, and first by name)" if equal else ""
    of = f" (of {count})" if count > len(passing) else ""
    return f"{verdict.chosen} ships: the smallest of {len(passing)} files{of} that met every rule{tie}."


def _kinds(nearest: Nearest) -> str:
    return _list([broken.kind for broken in nearest.broken])


def _list(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _lost(report: Report, subject: MeasuredFile) -> str:
    compared = report.compare(subject.name, "teacher")
    if compared is None:
        return f"What {subject.name} lost against the teacher was not measured."
    return f"{describe(report, compared)}."


def _bought(report: Report, taught: bool, subject: MeasuredFile) -> str:
    """In words that have the right sign; what is not certain is not said to be bought or cost."""
    if not taught:
        return f"Nothing was distilled: the best student, {report.winner}, learnt without the teacher."
    compared = report.compare(report.winner, "control")
    if compared is None:
        return ""
    if not _is_certain(compared):
        did = "Whether distillation bought or cost anything is not shown"
    else:
        did = "Distillation bought quality" if compared.value < 0 else "Distillation cost quality"
    by = "" if subject.student in (None, report.winner) else ", by the best student"
    return f"{did}{by}: {describe(report, compared)}, which trained as long without the teacher."


def _is_certain(compared: Comparison) -> bool:
    """Whether its interval leaves one direction alone."""
    return compared.low is not None and compared.high is not None and (compared.low > 0 or compared.high < 0)


def describe(report: Report, compared: Comparison) -> str:
    """Such as ``small is 1.40 % worse in bits per byte than teacher (95 % interval: 0.10 % better to 2.90 % worse; 20
    test documents)``."""
    task = TASKS[report.task]
    quality, unit = task.quality, task.quality.difference_unit
    worse, better = quality.comparatives

    def words(value: float) -> str:
        return f"{100 * abs(value):.2f} {unit} {worse if value > 0 else better}"

    metric = _quality_of(report, compared.name)
    units = "" if metric is None else f"; {format_count(metric.measured_on, f'test {task.test_unit}')}"
    if compared.low is None or compared.high is None:
        interval = "no interval" + (units or ": more than one test unit is needed")
    else:
        interval = f"{100 * report.confidence:g} % interval: {_ends(compared.low, compared.high, words)}{units}"
    how = "exactly as good" if compared.value == 0 else words(compared.value)
    than = "as" if compared.value == 0 else "than"
    return f"{compared.name} is {how} in {quality.title} {than} {compared.against} ({interval})"


def _ends(low: float, high: float, words: Callable[[float], str]) -> str:
    """From the better end to the worse one; one direction is named once."""
    if low < 0 < high:
        return f"{words(low)} to {words(high)}"
    near, far = sorted((abs(low), abs(high)))
    return f"{100 * near:.2f} to {words(far if high > 0 else -far)}"


def _quality_of(report: Report, name: str) -> Metric | None:
    found = report.find(name)
    return None if found is None else found.metrics.get(report.quality)


def _hollow_teacher(report: Report) -> Iterator[str]:
    for name, what in (("control", "which trained without it"), (report.winner, "its own student")):
        compared = report.compare(name, "teacher")
        if compared is not None and compared.value <= 0:
            word = "worse than" if _is_certain(compared) else "not shown to be better than"
            yield (
                f"the teacher is {word} {name}, {what}: {describe(report, compared)}. To keep much of such a teacher "
                "shows little"
            )


def _steep_curves(report: Report, curves: Mapping[str, Curve]) -> dict[str, float]:
    """By name, of the teacher, the best student and the control: which share of the loss the last steps took away."""
    found = {}
    for name in ("teacher", report.winner, "control"):
        share = late_fall(curves.get(name, ()))
        if share is not None and share >= STEEP:
            found[name] = share
    return found


def _under_way(steep: Mapping[str, float]) -> Iterator[str]:
    for name, share in steep.items():
        yield (
            f"the validation loss of {name} still fell by {100 * share:.0f} % in the last quarter of its steps: longer "
            "training would change what is compared"
        )


def late_fall(curve: Curve) -> float | None:
    """By which share of it a loss fell in the last quarter of its steps, between points on a straight line.

    None of fewer than three points.
    """
    if len(curve) < 3 or min(loss for _, loss in curve) <= 0:
        return None
    last_step, last = curve[-1]
    at = LAST_STEPS * last_step
    for (step, loss), (next_step, next_loss) in pairwise(curve):
        if step <= at <= next_step and next_step > step:
            before = loss + (next_loss - loss) * (at - step) / (next_step - step)
            return 1 - last / before
    return None


def _uncertain(report: Report, subject: MeasuredFile) -> Iterator[str]:
    task, quality = TASKS[report.task], subject.metrics[report.quality]
    if quality.n < FEW_UNITS:
        yield (
            f"{format_count(quality.n, f'test {task.test_unit}')}, fewer than {FEW_UNITS}: intervals are themselves "
            "uncertain"
        )
    students = [m for m in report.measured if m.name == m.student and m.name != report.winner]
    for other in students:
        compared = report.compare(report.winner, other.name)
        if compared is not None and not _is_certain(compared):
            yield f"the best student is not told apart from {other.name}: {describe(report, compared)}"


def contention(report: Report) -> Iterator[str]:
    """A warning where latencies were measured while the machine was busy."""
    lacked = {m.name: contended_cores(m) for m in report.measured}
    busy = {name: cores for name, cores in lacked.items() if cores >= CONTENDED_CORES}
    if busy:
        worst = max(busy, key=lambda name: busy[name])
        yield (
            f"latencies of {len(busy)} of {format_count(len(report.measured), 'file')} were measured while other "
            f"processes kept cores busy that the engine wanted (of {worst} {busy[worst]:.1f}): they are too long"
        )


def contended_cores(measured: MeasuredFile) -> float:
    """Cores that the engine's threads lacked while a file's latency was measured; 0 where that is not known."""
    found = measured.metrics.get("contended_cores")
    return 0.0 if found is None else found.value


def _next_steps(recipe: Recipe, report: Report, steep: Mapping[str, float]) -> Iterator[Remedy]:
    if recipe.train.steps and (teacher_is_behind(report) or "teacher" in steep):
        yield longer_teacher(recipe)
    elif report.winner in steep:
        yield longer_students(recipe)


def as_trained(recipe: Recipe, trial: Mapping[str, Any]) -> tuple[Sweep, Student]:
    """The settings and the student of a finished trial."""
    base = next(student for student in recipe.sweep.students if student.name == trial["student"])
    return apply_values(recipe.sweep, base, trial["values"])


def read_training(recipe: Recipe, train: Path, sweep: Path) -> Training:
    """From the folders of both stages' artifacts."""
    found = json.loads((sweep / "trials.json").read_text(encoding="utf-8"))
    _, student = as_trained(recipe, next(trial for trial in found["trials"] if trial["name"] == found["winner"]))
    curves = {name: read_curve(file, "validation_loss")[0] for name, file in curve_files(train, sweep).items()}
    return Training(curves, student.distilled)


def training_folders(artifacts: Mapping[str, Artifact]) -> tuple[Path, Path]:
    """Those of the teacher's training and of the sweep on this machine, with learning curves and without models."""
    return artifacts["train"].local("curve.jsonl"), artifacts["sweep"].local("trials.json", "curves/")


def curve_files(train: Path, sweep: Path) -> dict[str, Path]:
    """The learning curves of the teacher, which comes first, the trials and the control."""
    trials = {file.stem: file for file in sorted((sweep / "curves").glob("*.jsonl"))}
    return {"teacher": train / "curve.jsonl"} | trials


def read_curve(file: Path, *figures: str) -> tuple[Curve, ...]:
    """The points of each figure, where it is a number."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return tuple(
        tuple((int(row["step"]), row[name]) for row in rows if math.isfinite(row.get(name, math.nan)))
        for name in figures
    )
