"""A run that tests look at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from overproof.artifacts import Artifact
from overproof.config import Recipe

RECIPES = Path(__file__).parents[1] / "jobs/recipes"


@dataclass(frozen=True)
class Run:
    """A finished run and its artifacts by stage."""

    recipe: Recipe
    artifacts: dict[str, Artifact]
