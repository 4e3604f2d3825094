"""What a stage is given: ``stage(context) -> metrics``."""

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


NOTICE = "notice"  # a task whose words are events: each is shown, on a line that stays


class Progress(Protocol):
    """Picklable, cheap and safe to call from any process."""

    def __call__(self, task: str, done: int, total: int, note: str = "") -> None:
        """Say that ``done`` of ``total`` units of a task are over; ``note`` stands beside the bar."""


def no_progress(task: str, done: int, total: int, note: str = "") -> None:
    """Show nothing."""
