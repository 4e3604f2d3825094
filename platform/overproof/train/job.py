"""What every training worker is given."""

from __future__ import annotations

from dataclasses import dataclass

from overproof.artifact import Artifact, Draft
from overproof.progress import Progress
from overproof.recipe import Train
from overproof.train.checkpoint import Checkpoints


@dataclass(frozen=True)
class Job:
    """One training: its settings, its data, where it writes. Picklable."""

    train: Train
    seed: int
    prepared: Artifact
    draft: Draft
    checkpoints: Checkpoints
    progress: Progress
