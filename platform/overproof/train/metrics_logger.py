"""The learning curve on disk: JSON Lines for machines, TensorBoard events for people."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Self

from overproof.train.loop import CurveRow

CURVE_FILE = "curve.jsonl"
ROWS_HASH = "rows_hash"  # of a step: the sum of ``data.plan.rows_hash`` over the ranks, of the rows that came


class MetricsLogger:
    """Writes rows as they come. Call it with each row; it is a context manager."""

    def __init__(self, file: Path, events: Path | None = None) -> None:
        """``events`` is a folder for TensorBoard event files, or None for none."""
        from torch.utils.tensorboard import SummaryWriter

        file.parent.mkdir(parents=True, exist_ok=True)
        self.file = file.open("w", encoding="utf-8", buffering=1)
        self.events = SummaryWriter(str(events)) if events else None

    def __call__(self, row: CurveRow) -> None:
        self.file.write(json.dumps(row) + "\n")
        if self.events:
            for name, value in row.items():
                if name == "validation_loss":
                    self.events.add_scalar("validation/loss", value, int(row["step"]))
                elif name not in ("step", ROWS_HASH):
                    self.events.add_scalar(f"train/{name}", value, int(row["step"]))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()
        if self.events:
            self.events.close()
