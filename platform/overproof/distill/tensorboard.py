"""Trials as TensorBoard shows them: losses by step, and each trial's settings and status in its HParams tab."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

EVENTS = "events"  # folder of the sweep artifact, and of the workspace while the sweep runs
SCALARS = ("loss", "validation_loss")


class TrialEvents:
    """The event file of one trial, in a folder of its own. A context manager."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """``settings`` are the trial's; the trial is called as its folder is."""
        from tensorboard.plugins.hparams.api import hparams_pb
        from torch.utils.tensorboard import SummaryWriter  # with torch: seconds to import

        self.writer = SummaryWriter(str(folder))
        shown = {name: value for name, value in settings.items() if isinstance(value, int | float | str)}
        self._add_summary(hparams_pb(shown, trial_id=folder.name))

    def add(self, rows: Iterable[Mapping[str, float]]) -> None:
        """The losses of these rows of the trial's curve; readers see them at once."""
        for row in rows:
            for tag in SCALARS:
                if tag in row:
                    self.writer.add_scalar(tag, row[tag], int(row["step"]))
        self.writer.flush()

    def end(self, status: str) -> None:
        """How the trial ended: finished, stopped (by a scheduler, as it should be) or failed."""
        from tensorboard.plugins.hparams.api_pb2 import STATUS_FAILURE, STATUS_SUCCESS
        from tensorboard.plugins.hparams.summary import session_end_pb

        self._add_summary(session_end_pb(STATUS_FAILURE if status == "failed" else STATUS_SUCCESS))

    def _add_summary(self, summary: Any) -> None:
        writer: Any = self.writer.file_writer
        writer.add_summary(summary)

    def close(self) -> None:
        self.writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
