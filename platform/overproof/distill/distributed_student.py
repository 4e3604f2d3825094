"""Students that several workers train together: DeepSpeed ZeRO under Ray Train, inside a trial of Ray Tune.

The trial's own process takes no CPU: it starts the workers and hands on what rank 0 reports. They are placed all or
none, and the sweep starts no more trials at a time than fit the cluster, so that none waits for another's. The rows are
those that a student in one process reads; every rank reads its share of them from the mapped files.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ray.util.queue import Queue

from overproof.config import CheckpointPolicy, Optimization, Sweep, Training
from overproof.distill.trial_job import (
    MAX_DEATHS,
    CurveRow,
    CurveSegment,
    TrialJob,
    curve_segment,
    failed_result,
    trial_result,
)
from overproof.errors import InputError
from overproof.files import FileEntry
from overproof.stage_context import Notice, Progress, ProgressEvent, StepTrained
from overproof.train.ray_elastic import WorkerCheckpointSignal
from overproof.train.ray_trainer import join_group, run_workers
from overproof.train.train_job import TrainJob


@dataclass(frozen=True)
class RankReport:
    """What rank 0 reports at each validation."""

    parameters: int
    resumed_step: int
    segment: CurveSegment


@dataclass(frozen=True)
class StudentProgress:
    """Passes on the notices and steps of a training under its student's name."""

    name: str
    progress: Progress

    def __call__(self, event: ProgressEvent) -> None:
        if isinstance(event, Notice):
            self.progress(replace(event, text=f"{self.name}: {event.text}"))
        elif isinstance(event, StepTrained):
            self.progress(replace(event, task=self.name))


class DistributedStudentTrainer:
    """As ``InProcessTrainer``, with a group of workers in place of this process."""

    def start(self, job: TrialJob) -> None:
        self.job, self.steps_done, self.cpu_s, self.began = job, 0, 0.0, time.perf_counter()
        self.files: dict[str, FileEntry] = {}
        self.error: BaseException | None = None
        self.queue = Queue(actor_options={"num_cpus": 0})
        self.thread = threading.Thread(target=self._run, name=job.name, daemon=True)
        self.thread.start()

    def run_to_validation(self) -> dict[str, Any]:
        """Wait for the next validation; after that of the last step the weights are written.

        Raises:
            RuntimeError: workers died again and again.
        """
        while True:
            report: RankReport | None = self.queue.get()
            if report is None:
                return self._final_result()
            if report.segment.steps > self.steps_done:  # restarted workers report their whole history again
                break
        self.steps_done = report.segment.steps
        self.cpu_s += sum(row.get("cpu_s", 0.0) for row in report.segment.curve)
        if self.steps_done == self.job.settings.steps:
            self.thread.join()
            if self.error:
                return self._final_result()
        return trial_result(
            self.job,
            steps=self.steps_done,
            parameters=report.parameters,
            seconds=time.perf_counter() - self.began,
            cpu_seconds=self.cpu_s,
            resumed_step=report.resumed_step,
            validation_loss=report.segment.validation_loss,
            curve=report.segment.curve,
            files=self.files,
        )

    def _final_result(self) -> dict[str, Any]:
        assert self.error
        if isinstance(self.error, InputError):
            return failed_result(self.job, self.steps_done, str(self.error))
        raise self.error

    def _run(self) -> None:
        try:
            work = partial(train_student_rank, job=self.job, queue=self.queue)
            self.files = run_workers(distributed_job(self.job), work)
        except BaseException as error:  # raised by ``run_to_validation``
            self.error = error
        self.queue.put(None)


def distributed_job(job: TrialJob) -> TrainJob:
    """The student as a training of several workers."""
    from overproof.distill.distill_spec import DistillSpec

    return TrainJob(
        train=training_settings(job.settings),
        seed=job.seed,
        prepared=job.prepared,
        draft=job.draft,
        checkpoints=job.checkpoints,
        progress=StudentProgress(job.name, job.progress),
        spec=DistillSpec(job),
        extra_validation_steps=job.rungs,
    )


def training_settings(settings: Sweep) -> Training:
    """The settings of a student's training, with a checkpoint at every validation."""
    assert settings.group
    optimization = {name: getattr(settings, name) for name in Optimization.model_fields}
    policy = CheckpointPolicy(every_steps=settings.validate_every)
    return Training(**optimization, **settings.group.model_dump(), checkpoint=policy, max_failures=1 + MAX_DEATHS)


def train_student_rank(train_job: TrainJob, job: TrialJob, queue: Queue) -> dict[str, FileEntry]:
    """Train as one rank from the newest checkpoint, and at the end write the weights; rank 0 reports the curve, and
    returns the files that all ranks wrote.
    """
    start, rank, world = join_group(train_job)
    from overproof.train.metrics import ThroughputMeter
    from overproof.train.rank_trainer import RankTrainer, read_rank_rows  # seconds of imports

    trainer = RankTrainer(train_job, start, rank, world)
    rows: list[CurveRow] = []

    def report(row: CurveRow) -> None:
        rows.append(row)
        if "validation_loss" in row:
            queue.put(RankReport(trainer.parameters, start.step, curve_segment(rows)))
            rows.clear()

    if rank == 0:
        for row in trainer.curve:
            report(row)
    rank_rows = read_rank_rows(train_job, start, rank, world)
    meter = ThroughputMeter(train_job, trainer.manifest, world)
    trainer.train(rank_rows, WorkerCheckpointSignal(), meter, (report,) if rank == 0 else ())
    trainer.write_model(job.folder)
    return train_job.draft.handed_in
