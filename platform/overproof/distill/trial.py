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
    from overproof.distill.group import GroupTrainer
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
            return failure(self.job, self.reached, str(error)) | self._about()
        self.reached = chunk.steps
        measured = {"validation_loss": chunk.validation_loss, "curve": chunk.curve}
        return result(self.job, chunk.steps, **measured) | self._about()

    def _about(self) -> dict[str, Any]:
        found, run = {"import_seconds": self.import_seconds}, self.run
        if run is None:
            return found
        return {
            **found,
            "parameters": run.parameters,
            "seconds": run.seconds,
            "cpu_seconds": run.cpu_seconds,
            "began_at": run.began_at,
            "faults": tuple(run.faults),
            "values": values_of(run.job.settings, run.job.student),
        }


def result(job: Job, steps: int, **measured: Any) -> dict[str, Any]:
    """What Tune, the watch and the search are given: after ``steps`` steps, with what was measured."""
    return {
        "name": job.name,
        "steps": steps,
        "parameters": None,
        "seconds": 0.0,
        "cpu_seconds": 0.0,
        "began_at": 0,
        "faults": (),
        "pid": os.getpid(),
        "import_seconds": 0.0,
        "values": values_of(job.settings, job.student),
        "failed": None,
        **measured,
    }


def failure(job: Job, steps: int, reason: str) -> dict[str, Any]:
    """The result of a trial that cannot go on."""
    return result(job, steps, validation_loss=math.inf, curve=(), failed=reason)


def trainer(job: Job) -> Trainer | GroupTrainer:
    """Who trains a student as its settings ask: this process, or a group of workers."""
    if job.settings.group is None:
        return Trainer()
    from overproof.distill.group import GroupTrainer

    return GroupTrainer()


class Trial(tune.Trainable):
    """What Tune runs; one actor takes one student after another."""

    def setup(self, config: dict[str, Any]) -> None:
        self.trainer = trainer(config["job"])
        self.trainer.start(config["job"])

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.trainer.start(new_config["job"])
        return True

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        assert isinstance(self.trainer, Trainer)
        assert self.trainer.run
        self.trainer.run.write(Path(checkpoint_dir))

    def load_checkpoint(self, checkpoint: str) -> None:  # type: ignore[override]
        assert isinstance(self.trainer, Trainer)
        self.trainer.take_over(Path(checkpoint))

    def step(self) -> dict[str, Any]:
        result = self.trainer.advance()
        over = result["failed"] is not None or result["steps"] == self.trainer.job.settings.steps
        return result | {"done": over}
