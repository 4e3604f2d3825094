"""The actors of the sweep. Light to import: the model code comes with the first job of a process, and is timed."""

from __future__ import annotations

import importlib
import math
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import tune

from overproof.distill.job import Job
from overproof.errors import InputError
from overproof.recipe.search import values_of

if TYPE_CHECKING:
    from overproof.distill.student import Run

MODEL_CODE = "overproof.distill.student"
MEMORY_ADVICE = "a smaller model, sequence_length or sweep.batch_size takes less"


class Trainer:
    """Trains one job after another in one process; the model code is imported with the first."""

    def start(self, job: Job) -> None:
        began, paid = time.perf_counter(), MODEL_CODE not in sys.modules
        importlib.import_module(MODEL_CODE)
        self.import_seconds = round(time.perf_counter() - began, 3) if paid else 0.0
        self.job, self.reached = job, 0
        self.run: Run | None = None

    def take_over(self, folder: Path) -> None:
        """Go on from another trial's state."""
        from overproof.distill.student import Run

        self.run = Run(self.job, self.job.pool)
        self.run.load(folder)

    def advance(self) -> dict[str, Any]:
        """Train up to the next validation; after the last step the weights are written.

        What a student brings upon itself (a loss that is not finite, too little memory) is its result: the reason
        stands in ``failed``, and its loss is infinite.
        """
        from overproof.distill.student import Run
        from overproof.train.oom import explain_memory

        try:
            with explain_memory("training a student", MEMORY_ADVICE):
                run = self.run = self.run or Run(self.job, self.job.pool)
                chunk = run.advance()
                if chunk.steps == self.job.settings.steps:
                    run.save()
        except InputError as error:
            return self._result(validation_loss=math.inf, curve=(), failed=str(error))
        self.reached = chunk.steps
        return self._result(validation_loss=chunk.validation_loss, curve=chunk.curve, failed=None)

    def _result(self, **measured: Any) -> dict[str, Any]:
        run = self.run
        job = run.job if run else self.job
        return {
            "name": self.job.name,
            "steps": self.reached,
            "parameters": run.parameters if run else None,
            "seconds": run.seconds if run else 0.0,
            "cpu_seconds": run.cpu_seconds if run else 0.0,
            "began_at": run.began_at if run else 0,
            "faults": tuple(run.faults) if run else (),
            "pid": os.getpid(),
            "import_seconds": self.import_seconds,
            "values": values_of(job.settings, job.student),
            **measured,
        }


class Trial(tune.Trainable):
    """What Tune runs; one actor takes one student after another."""

    def setup(self, config: dict[str, Any]) -> None:
        self.trainer = Trainer()
        self.trainer.start(config["job"])

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.trainer.start(new_config["job"])
        return True

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        assert self.trainer.run
        self.trainer.run.write(Path(checkpoint_dir))

    def load_checkpoint(self, checkpoint: str) -> None:  # type: ignore[override]
        self.trainer.take_over(Path(checkpoint))

    def step(self) -> dict[str, Any]:
        result = self.trainer.advance()
        over = result["failed"] is not None or result["steps"] == self.trainer.job.settings.steps
        return result | {"done": over}
