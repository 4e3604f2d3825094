"""What a sweep remembers of itself while it runs: the values of each trial, written before the trial begins.

With a trial's own checkpoints this is all that a sweep needs to go on after its driver was killed: the search is told
again what came of the trials there were, and no trial is trained twice.
"""

from __future__ import annotations

from dataclasses import dataclass

from overproof.artifact import Draft
from overproof.errors import InputError
from overproof.files import filesystem, join, write_at_once
from overproof.recipe import Checkpoint
from overproof.recipe.search import Values
from overproof.train.checkpoint import Checkpoints, another, seal, unseal

JOURNAL = "sweep.json"


@dataclass(frozen=True)
class Journal:
    """Lies in the workspace of a sweep's draft."""

    draft: Draft

    def checkpoints(self, name: str) -> Checkpoints:
        """A trial's own."""
        draft = self.draft
        return Checkpoints(
            join(draft.workspace, f"trials/{name}"), draft.fingerprint, draft.config, draft.parents, Checkpoint()
        )

    def begin(self) -> dict[str, Values]:
        """The trials of an attempt that was killed, by name, in their order.

        Raises:
            InputError: the workspace holds trials of another recipe (what differs), or the journal is damaged.
        """
        draft = self.draft
        files, path = filesystem(join(draft.workspace, JOURNAL))
        found = unseal(files, path)
        if found == f"{JOURNAL} is missing":
            draft.clear_workspace()
            return {}
        if isinstance(found, str):
            raise InputError(f"{draft.workspace}: {found}; restore it, or delete the folder to start anew")
        trials: dict[str, Values] = found["trials"]
        if found["fingerprint"] == draft.fingerprint:
            return trials
        step = max((self.checkpoints(name).committed() for name in trials), default=0)
        if step:
            raise another(draft.workspace, found, draft.config, draft.parents, step)
        draft.clear_workspace()
        return {}

    def note(self, trials: dict[str, Values]) -> None:
        """Write down every trial so far."""
        draft = self.draft
        files, path = filesystem(join(draft.workspace, JOURNAL))
        files.create_dir(path.rpartition("/")[0], recursive=True)
        content = {"fingerprint": draft.fingerprint, "config": draft.config, "parents": dict(draft.parents)}
        write_at_once(files, path, seal({**content, "trials": trials}))
