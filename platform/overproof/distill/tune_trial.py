"""The actor that trains students under Ray Tune, one after another.

Light to import: the model code comes with the first job of a process, and is timed.
"""

from __future__ import annotations

import gc
import importlib
import shutil
import sys
import tempfile
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
        began, first = time.perf_counter(), MODEL_CODE not in sys.modules
        importlib.import_module(MODEL_CODE)
        self.import_seconds = round(time.perf_counter() - began, 3) if first else 0.0
        self.job, self.steps_done = job, 0
        self.student: StudentTrainer | None = None
        gc.collect()  # the last one's gigabytes hang in cycles of modules and generators

    def load_state(self, folder: Path) -> None:
        """Go on from another trial's state."""
        from overproof.distill.student_trainer import StudentTrainer

        self.student = StudentTrainer(self.job, self.job.scorer)
        self.student.load_state(folder)

    def write_state(self, folder: Path) -> None:
        """The state as it is, for another trial to go on from."""
        assert self.student
        self.student.write_state(folder)

    def run_to_validation(self) -> dict[str, Any]:
        """Train up to the next validation; after the last step the weights are written.

        What a student brings upon itself (a loss that is not finite, too little memory) is its result: the reason
        stands in ``failed``, and its loss is infinite.
        """
        from overproof.distill.student_trainer import StudentTrainer
        from overproof.train.engine import explain_memory

        try:
            with explain_memory("training a student", MEMORY_ADVICE):
                student = self.student = self.student or StudentTrainer(self.job, self.job.scorer)
                segment = student.run_to_validation()
                if segment.steps == self.job.settings.steps:
                    student.save_weights()
        except InputError as error:
            return failed_result(self.job, self.steps_done, str(error)) | self._measured()
        self.steps_done = segment.steps
        result = trial_result(self.job, segment.steps, validation_loss=segment.validation_loss, curve=segment.curve)
        return result | self._measured()

    def _measured(self) -> dict[str, Any]:
        measured, student = {"import_seconds": self.import_seconds}, self.student
        if student is None:
            return measured
        return {
            **measured,
            "parameters": student.parameters,
            "seconds": student.seconds,
            "cpu_seconds": student.cpu_seconds,
            "resumed_step": student.resumed_step,
            "faults": tuple(student.faults),
            "values": current_values(student.job.settings, student.job.student),
            "files": student.job.draft.handed_in,
        }


def trainer_for(job: TrialJob) -> InProcessTrainer | DistributedStudentTrainer:
    """What trains a student as its settings ask: this process, or a group of workers."""
    if job.settings.group is None:
        return InProcessTrainer()
    from overproof.distill.distributed_student import DistributedStudentTrainer

    return DistributedStudentTrainer()


class TuneTrial(tune.Trainable):
    """What Tune runs; with ``reuse_actors`` one actor takes one student after another."""

    def setup(self, config: dict[str, Any]) -> None:
        self.trainer = trainer_for(config["job"])
        self.trainer.start(config["job"])

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.trainer.start(new_config["job"])
        return True

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        assert isinstance(self.trainer, InProcessTrainer)  # a population has no groups
        self.trainer.write_state(Path(checkpoint_dir))

    def load_checkpoint(self, checkpoint: str) -> None:  # type: ignore[override]
        assert isinstance(self.trainer, InProcessTrainer)
        self.trainer.load_state(Path(checkpoint))

    def restore(self, checkpoint_path: Any) -> None:
        """From the files of a state alone: Tune would unpickle what lies beside them under a name of its own."""
        from overproof.distill.student_trainer import STATE_FILES

        with checkpoint_path.checkpoint.as_directory() as found, tempfile.TemporaryDirectory() as folder:
            for name in STATE_FILES:
                shutil.copyfile(Path(found) / name, Path(folder) / name)
            own = tune.Checkpoint.from_directory(folder)
            super().restore(type(checkpoint_path)(checkpoint=own, metrics=checkpoint_path.metrics))

    def step(self) -> dict[str, Any]:
        result = self.trainer.run_to_validation()
        done = result["failed"] is not None or result["steps"] == self.trainer.job.settings.steps
        return result | {"done": done}
