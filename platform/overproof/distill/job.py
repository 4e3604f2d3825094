"""What the actor that trains a student is given. Light to import: Ray reads it before the model code is there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from overproof.artifact import Artifact, Draft
from overproof.recipe import Student, Sweep
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
    seed: int
    threads: int
    prepared: Artifact
    cached: Artifact
    draft: Draft
    folder: str  # of the draft, for the weights
    checkpoints: Checkpoints


def rungs(settings: Sweep) -> Iterator[int]:
    """The steps at which successive halving compares trials, before the last."""
    step = settings.asha.grace_steps
    while step < settings.steps:
        yield step
        step *= settings.asha.reduction_factor
