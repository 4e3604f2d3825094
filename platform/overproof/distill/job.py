"""What the actor that trains a student is given. Light to import: Ray reads it before the model code is there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from overproof.artifact import Artifact, Draft
from overproof.recipe import Asha, Hyperband, Student, Sweep
from overproof.recipe.search import Scheduler
from overproof.train.checkpoint import Checkpoints

FINISHED = "finished"  # folder of the draft: weights of the trials that ran every step
CONTROL = "control"


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
    cached: Artifact
    draft: Draft
    folder: str  # of the draft, for the weights
    checkpoints: Checkpoints


def rungs(scheduler: Scheduler, steps: int) -> Iterator[int]:
    """The steps at which successive halving compares trials, before the last."""
    if isinstance(scheduler, Asha | Hyperband):
        step = scheduler.grace_steps
        while step < steps:
            yield step
            step *= scheduler.reduction_factor
