"""What the actor that trains a student is given. Light to import: Ray reads it before the model code is there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from overproof.artifact import Artifact, Draft
from overproof.progress import Progress, quiet
from overproof.recipe import Asha, Hyperband, Pbt, Student, Sweep
from overproof.recipe.search import Scheduler, Values, with_values
from overproof.train.checkpoint import Checkpoints

if TYPE_CHECKING:
    from overproof.distill.pool import Pool  # which imports Ray

FINISHED = "finished"  # folder of the draft: weights of the trials that ran every step
CONTROL = "control"
MAX_DEATHS = 3  # of the process of one trial or control, or its node


@dataclass(frozen=True)
class Job:
    """One student, or the control: the same rows, seed and steps, without the teacher."""

    name: str
    student: Student
    distilled: bool
    settings: Sweep
    rungs: frozenset[int]  # steps with a validation beside those of settings
    seed: int
    threads: int
    prepared: Artifact
    trained: Artifact
    cached: Artifact | None
    draft: Draft
    folder: str  # of the draft, for the weights
    checkpoints: Checkpoints
    retold: bool = True  # what an attempt that was killed has done is told again from its start, not from its end
    judged: tuple[float, ...] = ()  # temperatures at which the pool answers
    pool: Pool | None = None  # of teachers, who judge what students write
    progress: Progress = quiet
    written: Artifact | None = None  # text of the teacher

    def changed(self, values: Values) -> Job:
        """The same trial with other settings."""
        settings, student = with_values(self.settings, self.student, values)
        return replace(self, settings=settings, student=student)


def rungs(scheduler: Scheduler, steps: int) -> Iterator[int]:
    """The steps at which the scheduler compares trials, before the last."""
    if isinstance(scheduler, Pbt):
        yield from range(scheduler.interval_steps, steps, scheduler.interval_steps)
    if isinstance(scheduler, Asha | Hyperband):
        step = scheduler.grace_steps
        while step < steps:
            yield step
            step *= scheduler.reduction_factor
