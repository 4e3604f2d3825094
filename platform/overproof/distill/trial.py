"""The actors of the sweep. Light to import: the model code comes with the first job of a process, and is timed."""

from __future__ import annotations

import os
import time
from typing import Any

from ray import tune

from overproof.distill.job import Job


class Trainer:
    """Trains one job after another in one process; the model code is imported with the first."""

    def start(self, job: Job) -> None:
        began = time.perf_counter()
        from overproof.distill.student import Run

        self.import_seconds = round(time.perf_counter() - began, 3)
        self.job, self.seconds, self.run = job, 0.0, Run(job)

    def advance(self) -> dict[str, Any]:
        """Train up to the next validation; after the last step the weights are written."""
        began = time.perf_counter()
        chunk = self.run.advance()
        if chunk.steps == self.job.settings.steps:
            self.run.save()
        self.seconds += time.perf_counter() - began
        return {
            "name": self.job.name,
            "steps": chunk.steps,
            "validation_loss": chunk.validation_loss,
            "curve": chunk.curve,
            "parameters": self.run.parameters,
            "seconds": self.seconds,
            "pid": os.getpid(),
            "import_seconds": self.import_seconds,
        }


class Trial(tune.Trainable):
    """What Tune runs; one actor takes one student after another."""

    def setup(self, config: dict[str, Any]) -> None:
        self.trainer = Trainer()
        self.trainer.start(config["job"])

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.trainer.start(new_config["job"])
        return True

    def step(self) -> dict[str, Any]:
        return self.trainer.advance()
