"""The state of a running sweep on the store: the values of each trial, written before the trial starts.

With each trial's checkpoints this is all that a sweep needs to go on after its driver was killed: the search learns
the results of the finished trials again, and no trial is trained twice.

``sweep.json`` says whose sweep it is; each ``journal/NUMBER.json`` holds ``PART_TRIALS`` trials, and the last as many
as there are. A trial writes its part again, since object stores cannot append: however many came before, it costs that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pyarrow import fs

from overproof.artifacts import ArtifactWriter
from overproof.config import CheckpointPolicy
from overproof.config.search import TrialValues
from overproof.distill.trial_job import CONTROL
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
from overproof.units import format_count

SWEEP_STATE_FILE, JOURNAL, TRIALS = "sweep.json", "journal", "trials"
PART_TRIALS = 64  # of one file of the journal
StartedTrial = tuple[str, TrialValues]  # its name, and what it started with


@dataclass(frozen=True)
class SweepState:
    """Files in the workspace of a sweep's draft."""

    draft: ArtifactWriter

    def checkpoints(self, name: str) -> Checkpoints:
        """A trial's own."""
        draft = self.draft
        return Checkpoints(
            join_uri(draft.workspace, f"{TRIALS}/{name}"),
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
            raise _damaged(draft, found)
        trials = self._read_journal()
        if found["fingerprint"] == draft.fingerprint:
            return trials
        step = max((self.checkpoints(name).committed_step() for name in trials), default=0)
        if step:
            raise unfinished_training_error(draft.workspace, found, draft.config, draft.parents, step)
        draft.clear_workspace()
        return {}

    def record_trials(self, trials: Sequence[StartedTrial]) -> None:
        """Write down the last of the trials so far; those before it have been."""
        draft, part = self.draft, (len(trials) - 1) // PART_TRIALS
        files, path = filesystem(join_uri(draft.workspace, SWEEP_STATE_FILE))
        folder = f"{path.rpartition('/')[0]}/{JOURNAL}"
        if len(trials) == 1:
            files.create_dir(folder, recursive=True)
            whose = {"fingerprint": draft.fingerprint, "config": draft.config, "parents": dict(draft.parents)}
            atomic_write(files, path, with_checksum(whose))
        atomic_write(files, f"{folder}/{part:05d}.json", with_checksum({"trials": trials[part * PART_TRIALS :]}))

    def _read_journal(self) -> dict[str, TrialValues]:
        """Every trial that was written down, in their order.

        Raises:
            InputError: a part is missing or is not as it was written, or a trial began that none has.
        """
        draft, trials = self.draft, dict[str, TrialValues]()
        files, root = filesystem(draft.workspace)
        parts = [name for name in _names(files, f"{root}/{JOURNAL}") if name.endswith(".json")]
        for number in range(len(parts)):
            found = read_checksummed(files, f"{root}/{JOURNAL}/{number:05d}.json")
            if isinstance(found, Damage):
                raise _damaged(draft, found)
            trials |= found["trials"]
        if lost := _names(files, f"{root}/{TRIALS}") - trials.keys() - {CONTROL}:
            text = f"the journal lacks {format_count(len(lost), 'trial')} that began, such as {min(lost)}"
            raise _damaged(draft, Damage(DamageKind.CHANGED, text))
        return trials


def _names(files: fs.FileSystem, folder: str) -> set[str]:
    return {info.base_name for info in files.get_file_info(fs.FileSelector(folder, allow_not_found=True))}


def _damaged(draft: ArtifactWriter, damage: Damage) -> InputError:
    return InputError(f"{draft.workspace}: {damage}; restore it, or delete the folder to start anew")
