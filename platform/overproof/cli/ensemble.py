"""`overproof ensemble`: several models as one; a package stands for the model that its file was made from."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from overproof import pipeline
from overproof.artifacts import artifact_id
from overproof.config import Recipe
from overproof.console import out, say
from overproof.errors import InputError
from overproof.export.base import TEACHER
from overproof.models.ensemble_module import Combine
from overproof.package.contents import PACKAGE
from overproof.package.package import open_package
from overproof.train.ensemble import fit_weights, require_alike, require_new, write_ensemble

TELL_EVERY_S = 2.0


def ensemble(to: Path, members: Sequence[Path], combine: Combine, recipe: Recipe | None) -> int:
    """Write the directory, its members weighed on the recipe's validation rows where there is one.

    Raises:
        InputError: the members do not go together, or ``to`` is there.
    """
    members = [model_directory(member) for member in members]
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


def model_directory(member: Path) -> Path:
    """The Hugging Face directory of a member: its own, or that of a package's model, in the store of the run.

    Raises:
        InputError: the package's parts do not hold together, or what it was made from is not there.
    """
    if not (member / PACKAGE).is_file():
        return member
    package = open_package(member)
    student, parents = package.measured.student, package.content.parents
    stage, folder = ("train", "model") if student in (None, TEACHER) else ("sweep", f"students/{student}")
    found = member.resolve().parent / Path(artifact_id("", stage, parents[stage])).name / folder
    if not found.is_dir():
        raise InputError(
            f"{member}: made from {found}, which is not there: an ensemble is made of models, and a package holds a "
            "file for an engine; expected a package in the store of its run, or the model's directory"
        )
    return found
