"""What a stage is given, ``stage(context) -> metrics``, and the events by which it tells how far it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from overproof.artifacts import Artifact, ArtifactWriter
from overproof.config import Recipe


@dataclass(frozen=True)
class StageContext:
    """The recipe, the finished artifacts a stage builds on, and where it writes."""

    recipe: Recipe
    parents: Mapping[str, Artifact]
    draft: ArtifactWriter
    progress: Progress


@dataclass(frozen=True)
class TaskProgress:
    """``done`` of ``total`` units of a task are over; ``note`` is for people alone, and stands beside the bar."""

    task: str
    done: int
    total: int
    note: str = ""


@dataclass(frozen=True)
class StepTrained(TaskProgress):
    """A training has made step ``done``."""

    loss: float | None = None  # None: not finite, and the step was left out
    workers: int = 1


@dataclass(frozen=True)
class Notice:
    """Something happened that stays worth reading: shown on a line of its own."""

    text: str


@dataclass(frozen=True)
class TrainingResumed(Notice):
    """A training was interrupted and goes on from the checkpoint of a step."""

    step: int

    @classmethod
    def after(cls, cause: str, step: int) -> TrainingResumed:
        """With the cause and the step for a text."""
        return cls(f"{cause}; going on from step {step}", step)


ProgressEvent = TaskProgress | Notice


class Progress(Protocol):
    """Picklable, cheap and safe to call from any process."""

    def __call__(self, event: ProgressEvent) -> None:
        """Tell an event."""


def no_progress(event: ProgressEvent) -> None:
    """Show nothing."""
