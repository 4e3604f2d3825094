"""The actors of the sweep. Light to import: the model code comes with the first job of a process, and is timed."""

from __future__ import annotations

import importlib
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import tune

from overproof.config.search import current_values
from overproof.distill.trial_job import TrialJob, failed_result, trial_result
from overproof.errors import InputError

if TYPE_CHECKING:
    from overproof.distill.distributed_student import DistributedStudentTrainer
    from overproof.distill.student_trainer import StudentTrainer

MODEL_CODE = "overproof.distill.student_trainer"
MEMORY_ADVICE = "a smaller model, sequence_length or sweep.batch_size takes less"


class InProcessTrainer:
    """Trains one job after another in one process; the model code is imported with the first."""

    def start(self, job: TrialJob) -> None:
        began, paid = time.perf_counter(), MODEL_CODE not in sys.modules
        importlib.import_module(MODEL_CODE)
        self.import_seconds = round(time.perf_counter() - began, 3) if paid else 0.0
        self.job, self.reached = job, 0
        self.run: StudentTrainer | None = None

    def take_over(self, folder: Path) -> None:
        """Go on from another trial's state."""
        from overproof.distill.student_trainer import StudentTrainer

        self.run = StudentTrainer(self.job, self.job.pool)
        self.run.load(folder)

    def advance(self) -> dict[str, Any]:
        """Train up to the next validation; after the last step the weights are written.

        What a student brings upon itself (a loss that is not finite, too little memory) is its result: the reason
        stands in ``failed``, and its loss is infinite.
        """
        from overproof.distill.student_trainer import StudentTrainer
        from overproof.train.engine import explain_memory

        try:
            with explain_memory("training a student", MEMORY_ADVICE):
                run = self.run = self.run or StudentTrainer(self.job, self.job.pool)
                chunk = run.advance()
                if chunk.steps == self.job.settings.steps:
                    run.save()
        except InputError as error:
            return failed_result(self.job, self.reached, str(error)) | self._about()
        self.reached = chunk.steps
        measured = {"validation_loss": chunk.validation_loss, "curve": chunk.curve}
        return trial_result(self.job, chunk.steps, **measured) | self._about()

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
            "values": current_values(run.job.settings, run.job.student),
        }


def trainer_for(job: TrialJob) -> InProcessTrainer | DistributedStudentTrainer:
    """Who trains a student as its settings ask: this process, or a group of workers."""
    if job.settings.group is None:
        return InProcessTrainer()
    from overproof.distill.distributed_student import DistributedStudentTrainer

    return DistributedStudentTrainer()


class TuneTrial(tune.Trainable):
    """What Tune runs; one actor takes one student after another."""

    def setup(self, config: dict[str, Any]) -> None:
        self.trainer = trainer_for(config["job"])
        self.trainer.start(config["job"])

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.trainer.start(new_config["job"])
        return True

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        assert isinstance(self.trainer, InProcessTrainer)
        assert self.trainer.run
        self.trainer.run.write(Path(checkpoint_dir))

    def load_checkpoint(self, checkpoint: str) -> None:  # type: ignore[override]
        assert isinstance(self.trainer, InProcessTrainer)
        self.trainer.take_over(Path(checkpoint))

    def step(self) -> dict[str, Any]:
        result = self.trainer.advance()
        over = result["failed"] is not None or result["steps"] == self.trainer.job.settings.steps
        return result | {"done": over}
