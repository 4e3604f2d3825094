"""What goes in and out of the actor that trains a student: its job, its results, and curves cut at validations.

Light to import: Ray unpickles a job before the model code is there.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from overproof.artifacts import Artifact, ArtifactWriter
from overproof.config import Asha, Hyperband, Optimization, Pbt, Student, Sweep
from overproof.config.search import Scheduler, TrialValues, apply_values, current_values, first_comparison
from overproof.stage_context import Progress, no_progress
from overproof.train.checkpoint import Checkpoints

if TYPE_CHECKING:
    from overproof.distill.teacher_pool import ScorerPool  # which imports Ray

STUDENTS = "students"  # folder of the sweep's artifact: weights of the trials that ran every step, then of the kept
CONTROL = "control"
MAX_DEATHS = 3  # of the process of one trial or control, or its node


@dataclass(frozen=True)
class TrialJob:
    """One student; or its control: the same rows, seed and steps, without the teacher."""

    name: str
    student: Student
    distilled: bool
    settings: Sweep
    rungs: frozenset[int]  # steps with a validation, in addition to those of settings
    seed: int
    threads: int
    prepared: Artifact
    trained: Artifact
    draft: ArtifactWriter
    folder: str  # of the draft, for the weights
    checkpoints: Checkpoints
    target_cache: Artifact | None = None
    teacher_text: Artifact | None = None
    scorer: ScorerPool | None = None  # of what the student writes
    scorer_temperatures: tuple[float, ...] = ()  # at which it answers; ascending
    replay_history: bool = True  # a resumed trial reports every segment since its first step, not the last one alone
    progress: Progress = no_progress

    def with_values(self, values: TrialValues) -> TrialJob:
        """The same trial with other settings."""
        settings, student = apply_values(self.settings, self.student, values)
        return replace(self, settings=settings, student=student)


def rung_steps(scheduler: Scheduler, sweep: Optimization) -> Iterator[int]:
    """The steps at which the scheduler compares trials, before the last."""
    if isinstance(scheduler, Pbt):
        interval = first_comparison(scheduler, sweep)
        yield from range(interval, sweep.steps, interval)
    if isinstance(scheduler, Asha | Hyperband):
        step = first_comparison(scheduler, sweep)
        while step < sweep.steps:
            yield step
            step *= scheduler.reduction_factor


def trial_result(job: TrialJob, steps: int, **measured: Any) -> dict[str, Any]:
    """What Tune, the tracker and the search are given: after ``steps`` steps, with what was ``measured``."""
    return {
        "name": job.name,
        "steps": steps,
        "parameters": None,
        "seconds": 0.0,
        "cpu_seconds": 0.0,
        "resumed_step": 0,
        "faults": (),
        "pid": os.getpid(),
        "import_seconds": 0.0,
        "values": current_values(job.settings, job.student),
        "failed": None,
        "files": {},  # of the draft, once the weights are written
        **measured,
    }


def failed_result(job: TrialJob, steps: int, reason: str) -> dict[str, Any]:
    """The result of a trial that cannot go on."""
    return trial_result(job, steps, validation_loss=math.inf, curve=(), failed=reason)


CurveRow = dict[str, float]  # of a step or of a validation, as the loop gives it


@dataclass(frozen=True)
class CurveSegment:
    """The rows of a curve up to and with a validation."""

    steps: int  # since the trial's first
    validation_loss: float  # of the labels alone, nats: comparable between temperatures and weights
    curve: tuple[CurveRow, ...]


def curve_segment(curve: Sequence[CurveRow]) -> CurveSegment:
    """Of rows of which the last has a validation loss."""
    return CurveSegment(int(curve[-1]["step"]), curve[-1]["validation_loss"], tuple(curve))


def split_at_validations(curve: Iterable[CurveRow]) -> Iterator[CurveSegment]:
    """A curve, cut after each validation; what comes after the last is left out."""
    rows: list[CurveRow] = []
    for row in curve:
        rows.append(row)
        if "validation_loss" in row:
            yield curve_segment(rows)
            rows = []
