"""When a rank saves: every so many steps, after the last, and when somebody asks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist

from overproof.config import Training
from overproof.train.checkpoint_writer import AsyncCheckpointWriter
from overproof.train.deepspeed_engine import DeepSpeedEngine
from overproof.train.loop import CurveRow
from overproof.train.metrics_logger import CURVE_FILE


class CheckpointSignal(Protocol):
    """How a rank learns that a checkpoint is wanted before the next one is due."""

    def rung(self) -> bool:
        """Whether this rank was asked; called at every step."""

    def answered(self, step: int) -> None:
        """The checkpoint asked for is committed; called on every rank."""


class NoSignal:
    """A bell that nobody rings."""

    def rung(self) -> bool:
        return False

    def answered(self, step: int) -> None: ...


class CheckpointCallback:
    """The keeper of one rank's loop."""

    def __init__(
        self,
        engine: DeepSpeedEngine,
        train: Training,
        saver: AsyncCheckpointWriter,
        bell: CheckpointSignal,
        rows: Sequence[CurveRow],
    ) -> None:
        """``rows`` is the curve so far; rank 0's goes into every checkpoint."""
        self.engine, self.train, self.saver, self.bell, self.rows = engine, train, saver, bell, rows
        self._asked = False

    def tell(self, seen: int) -> None:
        """Before a step: begin to sum ``seen`` over the ranks, and whether one of them was asked for a checkpoint."""
        told = torch.tensor([seen, int(self.bell.rung())], dtype=torch.int64, device=self.engine.device)
        self._told = self.engine.totalling(told)

    def agree(self) -> int:
        """After the step: the sum of what was seen."""
        total, asked = self._told().tolist()
        self._asked = asked > 0
        return int(total)

    def after(self, step: int, score: float | None) -> None:
        """Save if it is time.

        Raises:
            InputError: an earlier save could not be written.
        """
        self.saver.check()
        if self._asked or step % self.train.checkpoint.every_steps == 0 or step == self.train.steps:
            lines = "".join(json.dumps(row) + "\n" for row in self.rows)
            self.saver.save(step, score, self.engine.save, {CURVE_FILE: lines.encode()} if self.saver.rank == 0 else {})
        if self._asked:
            self.finish()
            self.bell.answered(step)

    def finish(self) -> None:
        """Until every rank knows that the last save is committed."""
        self.saver.wait()
        dist.barrier()
