"""`overproof ensemble`: several classifiers' directories as one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from overproof import pipeline
from overproof.config import Recipe
from overproof.console import out, say
from overproof.errors import InputError
from overproof.models.ensemble_module import Combine
from overproof.train.ensemble import fit_weights, require_alike, require_new, write_ensemble

TELL_EVERY_S = 2.0


def ensemble(to: Path, members: Sequence[Path], combine: Combine, recipe: Recipe | None) -> int:
    """Write the directory, its members weighed on the recipe's validation rows where there is one.

    Raises:
        InputError: the members do not go together, or ``to`` is there.
    """
    require_alike(members)
    require_new(to)
    weights: Sequence[float] = [1 / len(members)] * len(members)
    if recipe is not None:
        if combine != "probabilities":
            raise InputError(f"--fit: found with --combine {combine}; weights are fitted for averaged probabilities")
        told_s = time.monotonic()

        def tell(note: str) -> None:
            nonlocal told_s
            if time.monotonic() - told_s >= TELL_EVERY_S:
                told_s = time.monotonic()
                say(note)

        weights = fit_weights(members, pipeline.run(recipe, "prepare")["prepare"], tell).tolist()
    write_ensemble(members, to, combine, weights)
    for member, weight in zip(members, weights, strict=True):
        out.print(f"{100 * weight:5.1f} %  {member}", markup=False)
    out.print(f"as a teacher: --set 'train.model={{kind: pretrained, path: {to}}}' --set train.steps=0", markup=False)
    return 0
