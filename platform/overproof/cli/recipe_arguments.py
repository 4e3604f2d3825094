"""A recipe as it is named on a command line, so that what is printed can be run as it stands."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RecipeArguments:
    """The recipe's file and what ``--set`` changed of it."""

    path: Path
    overrides: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.with_overrides()

    def with_overrides(self, *more: str) -> str:
        """The words of a command line; a field that is set anew is named once."""
        fields = {override.partition("=")[0] for override in more}
        kept = [override for override in self.overrides if override.partition("=")[0] not in fields]
        return shlex.join([str(self.path), *_flags(kept), *_flags(more)])


def _flags(overrides: Sequence[str]) -> list[str]:
    return [word for override in overrides for word in ("--set", override)]
