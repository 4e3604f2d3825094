"""Controls: what students become without their teacher. Only the difference to them is what distillation bought."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayActorError

from overproof.distill.sweep_state import SweepState
from overproof.distill.sweep_tracker import SweepTracker
from overproof.distill.trial_job import CONTROL, MAX_DEATHS, STUDENTS, TrialJob
from overproof.distill.tune_trial import trainer_for
from overproof.errors import InputError


def control_job(job: TrialJob, state: SweepState, best: bool) -> TrialJob:
    """A student's shape, start, rows, seed, steps and threads without the teacher; the best one's is kept."""
    name = CONTROL if best else f"{CONTROL}-{job.name}"
    checkpoints = state.checkpoints(f"{CONTROL}/{job.name}")
    folder = CONTROL if best else f"{STUDENTS}/{name}"
    return replace(job, name=name, distilled=False, folder=folder, checkpoints=checkpoints)


def train_controls(jobs: Sequence[TrialJob], room: Callable[[], int], tracker: SweepTracker) -> None:
    """Train every control to the end, as many at a time as there is room for; one whose process dies goes on from its
    checkpoint in another.

    Raises:
        InputError: one failed.
        RayActorError: the process of one died again and again.
    """
    for job in jobs:
        job.checkpoints.claim_folder()
    settings = jobs[0].settings
    waiting, actors, running = list(jobs), dict[str, Any](), dict[Any, TrialJob]()  # by the pending result of each
    deaths = Counter[str]()
    cpus, gpus = (0.0, 0.0) if settings.group else (settings.cpus_per_trial, settings.gpus_per_trial)
    remote: Any = ray.remote(num_cpus=cpus, num_gpus=gpus)(type(trainer_for(jobs[0])))
    tracker.start_controls({job.name: job.settings.steps for job in jobs})
    try:
        while waiting or running:
            while waiting and len(running) < room():
                job = waiting.pop(0)
                actors[job.name] = actor = remote.remote()
                actor.start.remote(job)
                running[actor.run_to_validation.remote()] = job
            (ready, *_), _ = ray.wait(list(running))
            job = running.pop(ready)
            try:
                result = ray.get(ready)
            except RayActorError:
                deaths[job.name] += 1
                if deaths[job.name] > MAX_DEATHS:
                    raise
                waiting.insert(0, job)
                continue
            if result["failed"] is not None:
                raise InputError(f"{job.name}: {result['failed']}")
            tracker.record_result(result)
            tracker.report_controls(f"validation {result['validation_loss']:.3f}")
            if result["steps"] < job.settings.steps:
                running[actors[job.name].run_to_validation.remote()] = job
            else:
                ray.kill(actors.pop(job.name))
    finally:
        for actor in actors.values():
            ray.kill(actor)
