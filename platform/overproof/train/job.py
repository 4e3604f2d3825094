"""What every training worker is given."""

from __future__ import annotations

from dataclasses import dataclass

from overproof.artifact import Artifact, Draft
from overproof.progress import Progress
from overproof.recipe import Training
from overproof.train.checkpoint import Checkpoints
from overproof.train.lesson import Lesson


@dataclass(frozen=True)
class Job:
    """One training: its settings, its data, what it learns, where it writes. Picklable."""

    train: Training
    seed: int
    prepared: Artifact
    draft: Draft
    checkpoints: Checkpoints
    progress: Progress
    lesson: Lesson
    validated: frozenset[int] = frozenset()  # steps with a validation beside those of train
