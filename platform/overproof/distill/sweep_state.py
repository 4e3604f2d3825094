"""The state of a running sweep on the store: the values of each trial, written before the trial starts.

With each trial's checkpoints this is all that a sweep needs to go on after its driver was killed: the search learns
the results of the finished trials again, and no trial is trained twice.
"""

from __future__ import annotations

from dataclasses import dataclass

from overproof.artifacts import ArtifactWriter
from overproof.config import CheckpointPolicy
from overproof.config.search import TrialValues
from overproof.errors import InputError
from overproof.files import atomic_write, filesystem, join_uri
from overproof.train.checkpoint import (
    Checkpoints,
    Damage,
    DamageKind,
    read_checksummed,
    unfinished_training_error,
    with_checksum,
)

SWEEP_STATE_FILE = "sweep.json"


@dataclass(frozen=True)
class SweepState:
    """A file in the workspace of a sweep's draft."""

    draft: ArtifactWriter

    def checkpoints(self, name: str) -> Checkpoints:
        """A trial's own."""
        draft = self.draft
        return Checkpoints(
            join_uri(draft.workspace, f"trials/{name}"),
            draft.fingerprint,
            draft.config,
            draft.parents,
            CheckpointPolicy(),
        )

    def load_trials(self) -> dict[str, TrialValues]:
        """The trials of an attempt that was killed, by name, in their order.

        Raises:
            InputError: the workspace holds trials of another recipe (what differs), or the file is damaged.
        """
        draft = self.draft
        files, path = filesystem(join_uri(draft.workspace, SWEEP_STATE_FILE))
        found = read_checksummed(files, path)
        if isinstance(found, Damage):
            if found.kind == DamageKind.MISSING:
                draft.clear_workspace()
                return {}
            raise InputError(f"{draft.workspace}: {found}; restore it, or delete the folder to start anew")
        trials: dict[str, TrialValues] = found["trials"]
        if found["fingerprint"] == draft.fingerprint:
            return trials
        step = max((self.checkpoints(name).committed_step() for name in trials), default=0)
        if step:
            raise unfinished_training_error(draft.workspace, found, draft.config, draft.parents, step)
        draft.clear_workspace()
        return {}

    def record_trials(self, trials: dict[str, TrialValues]) -> None:
        """Replace the file by one of every trial so far."""
        draft = self.draft
        files, path = filesystem(join_uri(draft.workspace, SWEEP_STATE_FILE))
        files.create_dir(path.rpartition("/")[0], recursive=True)
        content = {"fingerprint": draft.fingerprint, "config": draft.config, "parents": dict(draft.parents)}
        atomic_write(files, path, with_checksum({**content, "trials": trials}))
