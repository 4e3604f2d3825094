"""Which students of a sweep are worth a file, and where their weights lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pyarrow import fs

from overproof.distill.trial_job import FINISHED
from overproof.files import filesystem

STUDENTS = "students"  # folder of the sweep artifact: the weights of each student that is kept


def pareto_students(trials: Sequence[Mapping[str, Any]], winner: str, most: int) -> list[str]:
    """Of the trials that ran every step, those that none beats in validation loss and parameters at once.

    Best loss first, so the winner always is the first; at most ``most``. Of equals the first is taken.
    """
    finished = [trial for trial in trials if trial["status"] == "finished"]
    ranked = sorted(finished, key=lambda t: (t["validation_loss"], t["name"] != winner, t["parameters"]))
    kept: list[Mapping[str, Any]] = []
    for trial in ranked:
        if not kept or trial["parameters"] < kept[-1]["parameters"]:
            kept.append(trial)
    return [str(trial["name"]) for trial in kept[:most]]


def publish_students(uri: str, names: Sequence[str]) -> None:
    """Move these students' weights to students/ and drop the others; object stores cannot move a folder."""
    store, root = filesystem(uri)
    for name in names:
        old, new = f"{root}/{FINISHED}/{name}", f"{root}/{STUDENTS}/{name}"
        store.create_dir(new)
        fs.copy_files(old, new, source_filesystem=store, destination_filesystem=store)
    store.delete_dir(f"{root}/{FINISHED}")
