"""What a stage is given: ``stage(context) -> metrics``."""

from collections.abc import Mapping
from dataclasses import dataclass

from overproof.artifact import Artifact, Draft
from overproof.progress import Progress
from overproof.recipe import Recipe


@dataclass(frozen=True)
class Context:
    """The recipe, the finished artifacts a stage builds on, and where it writes."""

    recipe: Recipe
    parents: Mapping[str, Artifact]
    draft: Draft
    progress: Progress
