"""Trials as TensorBoard shows them: losses by step, and each trial's settings in its HParams tab."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

EVENTS = "events"  # folder of the sweep artifact, and of the workspace while the sweep runs
SCALARS = ("loss", "validation_loss")


class TrialEvents:
    """The event file of one trial, in a folder of its own. A context manager."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter  # with torch: seconds to import
        from torch.utils.tensorboard.summary import hparams

        self.writer = SummaryWriter(str(folder))
        shown = {name: value for name, value in settings.items() if isinstance(value, int | float | str)}
        experiment, start, self._success = hparams(shown, {"validation_loss": 0.0})  # type: ignore[no-untyped-call]
        self._add_summaries(experiment, start)

    def add(self, rows: Iterable[Mapping[str, float]]) -> None:
        """The losses of these rows of the trial's curve; readers see them at once."""
        for row in rows:
            for tag in SCALARS:
                if tag in row:
                    self.writer.add_scalar(tag, row[tag], int(row["step"]))
        self.writer.flush()

    def succeed(self) -> None:
        """The trial has ended as it should; the status of one without this is unknown."""
        self._add_summaries(self._success)

    def close(self) -> None:
        self.writer.close()

    def _add_summaries(self, *summaries: Any) -> None:
        writer: Any = self.writer.file_writer
        for summary in summaries:
            writer.add_summary(summary)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
