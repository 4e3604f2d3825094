"""Students that several workers train together: DeepSpeed ZeRO under Ray Train, inside a trial of Ray Tune.

The trial's own process takes no CPU: it starts the group and hands on what rank 0 tells. The group is placed as a whole
or not at all, and the sweep begins no more trials at a time than there is room for, so that none waits for another.
Rows are those that a student in one process reads, in parts: every rank reads its own from the mapped files.
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
from overproof.stage_context import Notice, Progress, ProgressEvent
from overproof.train.ray_elastic import WorkerCheckpointSignal
from overproof.train.ray_trainer import join_group, run_workers
from overproof.train.train_job import TrainJob as Group


@dataclass(frozen=True)
class RankReport:
    """What rank 0 tells of a training."""

    parameters: int
    began_at: int
    chunk: CurveSegment


@dataclass(frozen=True)
class StudentNotices:
    """Of a group's progress what happens to it, under its student's name; how far it is its results say."""

    name: str
    progress: Progress

    def __call__(self, event: ProgressEvent) -> None:
        if isinstance(event, Notice):
            self.progress(replace(event, text=f"{self.name}: {event.text}"))


class DistributedStudentTrainer:
    """As ``trial.Trainer``, with a group of workers in place of this process."""

    def start(self, job: TrialJob) -> None:
        self.job, self.reached, self.cpu_s, self.began = job, 0, 0.0, time.perf_counter()
        self.error: BaseException | None = None
        self.queue = Queue(actor_options={"num_cpus": 0})
        self.thread = threading.Thread(target=self._run, name=job.name, daemon=True)
        self.thread.start()

    def advance(self) -> dict[str, Any]:
        """Wait for the next validation; after that of the last step the weights are written.

        Raises:
            RuntimeError: workers died again and again.
        """
        while True:
            told: RankReport | None = self.queue.get()
            if told is None:
                return self._over()
            if told.chunk.steps > self.reached:  # workers that start again tell of all there was before
                break
        self.reached = told.chunk.steps
        self.cpu_s += sum(row.get("cpu_s", 0.0) for row in told.chunk.curve)
        if self.reached == self.job.settings.steps:
            self.thread.join()
            if self.error:
                return self._over()
        return trial_result(
            self.job,
            steps=self.reached,
            parameters=told.parameters,
            seconds=time.perf_counter() - self.began,
            cpu_seconds=self.cpu_s,
            began_at=told.began_at,
            validation_loss=told.chunk.validation_loss,
            curve=told.chunk.curve,
        )

    def _over(self) -> dict[str, Any]:
        assert self.error
        if isinstance(self.error, InputError):
            return failed_result(self.job, self.reached, str(self.error))
        raise self.error

    def _run(self) -> None:
        try:
            run_workers(distributed_job(self.job), partial(train_student_rank, job=self.job, queue=self.queue))
        except BaseException as error:  # surfaces in ``advance``
            self.error = error
        self.queue.put(None)


def distributed_job(job: TrialJob) -> Group:
    """The student as a training of several workers."""
    from overproof.distill.distill_spec import DistillSpec

    return Group(
        train=training_settings(job.settings),
        seed=job.seed,
        prepared=job.prepared,
        draft=job.draft,
        checkpoints=job.checkpoints,
        progress=StudentNotices(job.name, job.progress),
        spec=DistillSpec(job),
        extra_validation_steps=job.rungs,
    )


def training_settings(settings: Sweep) -> Training:
    """The settings of a student's training, with a checkpoint at every validation."""
    assert settings.group
    steps = {name: getattr(settings, name) for name in Optimization.model_fields}
    kept = CheckpointPolicy(every_steps=settings.validate_every)
    return Training(**steps, **settings.group.model_dump(), checkpoint=kept, max_failures=1 + MAX_DEATHS)


def train_student_rank(given: Group, job: TrialJob, queue: Queue) -> None:
    """Train as one rank from the newest checkpoint; rank 0 tells the curve, and at the end writes the weights."""
    start, rank, world = join_group(given)
    from overproof.train.metrics import ThroughputMeter
    from overproof.train.rank_trainer import RankTrainer, read_rank_rows  # seconds of imports

    trainee = RankTrainer(given, start, rank, world)
    part: list[CurveRow] = []

    def tell(row: CurveRow) -> None:
        part.append(row)
        if "validation_loss" in row:
            queue.put(RankReport(trainee.parameters, start.step, curve_segment(part)))
            part.clear()

    if rank == 0:
        for row in trainee.curve:
            tell(row)
    watch = ThroughputMeter(given, trainee.manifest, world)
    trainee.train(
        read_rank_rows(given, start, rank, world), WorkerCheckpointSignal(), watch, (tell,) if rank == 0 else ()
    )
    if rank == 0:
        with given.draft.directory() as folder:
            trainee.write_model(folder / job.folder)
