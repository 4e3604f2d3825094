"""`overproof shrink` and `overproof init`: from a model or data to a recipe, and from there to a package."""

from __future__ import annotations

import shlex
from contextlib import suppress
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from overproof import console
from overproof.cli import artifacts, plan
from overproof.cli.recipe_arguments import RecipeArguments
from overproof.console import out
from overproof.errors import InputError
from overproof.shrink.choice import Asked, ProposedRecipe
from overproof.shrink.estimate import choose_within, machine_flops


def init(asked: Asked, to: Path | None) -> int:
    """Print what was chosen and why, write the recipe, and say how to go on.

    Raises:
        InputError: see ``choose_within``; or another recipe lies where this one would.
    """
    _, path = _write(asked, to)
    word = shlex.quote(str(path))
    out.print(f"next:    overproof plan {word}\n         overproof run {word}", markup=False)
    return 0


def shrink(asked: Asked, to: Path | None) -> int:
    """The same, then run the recipe to its package.

    Raises:
        InputError: as ``init``, or what a run refuses.
        GateRefused: no file met the budget; which came nearest, and what would have to give, is printed before.
    """
    choice, path = _write(asked, to)
    recipe = choice.recipe
    plan.plan(recipe, plan.PlanOptions())
    done = artifacts.run_to_summary(recipe, RecipeArguments(path))
    out.print(f"recipe   {path}", markup=False)
    artifacts.print_package(recipe.store, done["package"])
    return 0


def _write(asked: Asked, to: Path | None) -> tuple[ProposedRecipe, Path]:
    with console.waiting("looking at the model and the data"):
        choice, needed = choose_within(asked, machine_flops())
    path = to or Path(f"{choice.recipe.name}.yaml")
    _require_free(path, choice.text)
    table = Table("choice", "", box=None, pad_edge=False, show_header=False)
    for what, why in choice.reasons.items():
        table.add_row(f"[bold]{what}[/]", escape(why))
    for what, text in zip(("time", "memory"), needed.lines(), strict=True):
        table.add_row(f"[bold]{what}[/]", escape(text))
    out.print(table)
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_text(choice.text, encoding="utf-8")
        part.replace(path)  # never half of it: what lies there is taken for edited
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise InputError(f"{path}: {error.strerror}; give a file you may write: --out FILE") from None
    out.print(f"recipe   {path}", markup=False)
    return choice, path


def _require_free(path: Path, text: str) -> None:
    """Refuse to write over a recipe that says something else: it may have been edited."""
    if not path.exists():
        return
    if path.is_dir() or path.read_text(encoding="utf-8", errors="replace") != text:
        raise InputError(
            f"{path}: lies there already and says something else; run it (overproof run {shlex.quote(str(path))}), "
            "delete it, or give another --name or --out"
        )
