"""The sweep stage: Ray Tune trains every student on the one cache under ASHA, then the control without the teacher."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from pyarrow import fs
from ray import tune
from ray.exceptions import RayTaskError
from ray.tune.schedulers import ASHAScheduler

from overproof.cluster import own_interrupt
from overproof.data.manifest import MANIFEST, Manifest
from overproof.distill.job import CONTROL, FINISHED, Job
from overproof.distill.targets import TEACHER, Targets
from overproof.distill.trial import Trainer, Trial
from overproof.errors import InputError
from overproof.files import filesystem
from overproof.progress import Progress
from overproof.recipe import Sweep
from overproof.stage import Context

Result = Mapping[str, Any]
TRIAL = ("name", "temperature", "teacher_weight", "parameters", "steps", "validation_loss", "status", "seconds", "pid",
         "import_seconds")  # fmt: skip
QUIET = {"RAY_AIR_NEW_OUTPUT": "0", "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1"}


def sweep(context: Context) -> dict[str, Any]:
    """Train the students and the control; writes trials.json, curves/, student/ and control/.

    Raises:
        InputError: the cache was made for another teacher or other data, or lacks rows; a loss is not finite.
    """
    settings, students = context.recipe.sweep, jobs(context)
    check_cache(context)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    at_once = min(settings.concurrent_trials, max(1, slots(settings, nodes)))
    watch = Watch(context.progress, settings, [job.name for job in students])
    _tune(students, settings, at_once, watch)
    winner = watch.winner()
    chosen = next(job for job in students if job.name == winner["name"])
    control = replace(chosen, name=CONTROL, distilled=False, folder=CONTROL)
    _run_control(control, watch)
    _keep(context.draft.uri, chosen.name)
    trials = [watch.trial(job) for job in students]
    with context.draft.directory() as folder:
        watch.write(folder / "curves")
        content = {"winner": chosen.name, "trials": trials, "control": watch.trial(control)}
        (folder / "trials.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return {
        "winner": chosen.name,
        "validation_loss": winner["validation_loss"],
        "control_validation_loss": watch.last[CONTROL]["validation_loss"],
        "trials": len(trials),
        "stopped_early": sum(trial["status"] == "stopped" for trial in trials),
        "processes": len({trial["pid"] for trial in trials}),
        "steps": sum(trial["steps"] for trial in trials),
    }


def check_cache(context: Context) -> None:
    """Refuse a cache that does not belong to this teacher and data, or that lacks something the sweep reads.

    Raises:
        InputError: what differs, or what is missing.
    """
    recipe, parents = context.recipe, context.parents
    targets = Targets(parents["cache"].local())
    manifest = Manifest.read(parents["prepare"].local())
    targets.index.check(parents["train"].record.files[TEACHER].sha256, parents["prepare"].record.files[MANIFEST].sha256)
    for student in recipe.sweep.students:
        targets.index.column(student.temperature)
    order = manifest.order(recipe.seed)
    targets.require(order.rows_at(0, min(order.rows, recipe.sweep.steps * recipe.sweep.batch_size)))


def slots(settings: Sweep, nodes: Sequence[Mapping[str, float]]) -> int:
    """Trials that fit the nodes (their resources) at the same time; a trial lies within one node."""
    wants = {"CPU": settings.cpus_per_trial, "GPU": settings.gpus_per_trial}
    return sum(min(int(node.get(unit, 0) / want) for unit, want in wants.items() if want) for node in nodes)


def jobs(context: Context) -> list[Job]:
    """One for each student of the recipe."""
    settings, parents = context.recipe.sweep, context.parents
    return [
        Job(
            name=student.name,
            student=student,
            distilled=True,
            settings=settings,
            seed=context.recipe.seed,
            threads=max(1, int(settings.cpus_per_trial)),
            prepared=parents["prepare"],
            cached=parents["cache"],
            draft=context.draft,
            folder=f"{FINISHED}/{student.name}",
        )
        for student in settings.students
    ]


class Watch(tune.Callback):
    """Follows the trials: their curves, their last results, the bar."""

    def __init__(self, progress: Progress, settings: Sweep, names: Sequence[str]) -> None:
        self.progress, self.settings = progress, settings
        self.curves: dict[str, list[Mapping[str, float]]] = {name: [] for name in names}
        self.last: dict[str, Result] = {}
        self.over: set[str] = set()
        self.show()

    def on_trial_result(self, *, result: Result, **_: Any) -> None:  # type: ignore[override]
        self.take(result)
        self.show()

    def on_trial_complete(self, *, trial: Any, **_: Any) -> None:  # type: ignore[override]
        self.over.add(trial.config["job"].name)
        self.show()

    def take(self, result: Result) -> None:
        self.curves.setdefault(result["name"], []).extend(result["curve"])
        self.last[result["name"]] = result

    def show(self) -> None:
        steps, names = self.settings.steps, [name for name in self.curves if name != CONTROL]
        done = sum(steps if name in self.over else int(self.last[name]["steps"]) for name in names if name in self.last)
        best = min(self.last.values(), key=lambda result: float(result["validation_loss"]), default=None)
        note = f"best {best['validation_loss']:.3f} ({best['name']})" if best else "starting trials"
        self.progress("sweep", done, steps * len(names), note)

    def winner(self) -> Result:
        """The best of those that ran every step."""
        finished = [result for result in self.last.values() if result["steps"] == self.settings.steps]
        return min(finished, key=lambda result: float(result["validation_loss"]))

    def trial(self, job: Job) -> dict[str, Any]:
        """A job's entry in trials.json."""
        result = self.last[job.name]
        about = {
            "temperature": job.student.temperature,
            "teacher_weight": job.student.teacher_weight if job.distilled else 0.0,
            "status": "finished" if result["steps"] == job.settings.steps else "stopped",
        }
        return {name: about[name] if name in about else result[name] for name in TRIAL}

    def write(self, folder: Path) -> None:
        """A file of JSON lines for each curve."""
        folder.mkdir()
        for name, rows in self.curves.items():
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def _tune(jobs: Sequence[Job], settings: Sweep, at_once: int, watch: Watch) -> None:
    """Run every job until ASHA stops it or it has run every step.

    Raises:
        InputError: a trial met bad input; the message names it.
        RuntimeError: a trial failed otherwise.
    """
    scheduler = ASHAScheduler(
        time_attr="steps",
        metric="validation_loss",
        mode="min",
        max_t=settings.steps,
        grace_period=min(settings.asha.grace_steps, settings.steps),
        reduction_factor=settings.asha.reduction_factor,
    )
    with tempfile.TemporaryDirectory(prefix="overproof-sweep-") as scratch, _tame():
        results = tune.Tuner(
            tune.with_resources(Trial, {"cpu": settings.cpus_per_trial, "gpu": settings.gpus_per_trial}),
            param_space={"job": tune.grid_search(list(jobs))},
            tune_config=tune.TuneConfig(scheduler=scheduler, max_concurrent_trials=at_once, reuse_actors=True),
            run_config=tune.RunConfig(
                name="sweep",
                storage_path=scratch,
                verbose=0,
                callbacks=[watch],
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # a finished trial wrote its weights
                failure_config=tune.FailureConfig(fail_fast=True),
            ),
        ).fit()
    for result in (results[i] for i in range(len(results))):
        if result.error:
            name = (result.config or {})["job"].name
            cause = _input_error(result.error)
            if cause:
                raise InputError(f"student {name}: {cause}") from None
            raise RuntimeError(f"student {name}: {result.error}") from result.error
    if watch.over != {job.name for job in jobs}:
        raise KeyboardInterrupt


def _input_error(error: BaseException | None) -> InputError | None:
    """The InputError that a trial raised, below what Ray wrapped around it."""
    while isinstance(error, RayTaskError):
        error = error.cause
    return error if isinstance(error, InputError) else None


@contextmanager
def _tame() -> Iterator[None]:
    """Tune prints tables at any verbosity and logs each trial to files."""
    logger = logging.getLogger("ray.tune")
    before, level = {name: os.environ.get(name) for name in QUIET}, logger.level
    os.environ.update(QUIET)
    logger.setLevel(logging.CRITICAL)  # errors are raised, with the student's name
    try:
        with own_interrupt():
            yield
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _run_control(job: Job, watch: Watch) -> None:
    """The winner's shape, rows, seed, steps and threads without the teacher."""
    settings = job.settings
    watch.progress(CONTROL, 0, settings.steps, "starting")
    actor: Any = ray.remote(num_cpus=settings.cpus_per_trial, num_gpus=settings.gpus_per_trial)(Trainer).remote()
    try:
        ray.get(actor.start.remote(job))
        steps = 0
        while steps < settings.steps:
            result = ray.get(actor.advance.remote())
            steps = result["steps"]
            watch.take(result)
            watch.progress(CONTROL, steps, settings.steps, f"validation {result['validation_loss']:.3f}")
    except RayTaskError as error:
        cause = _input_error(error)
        if cause is None:
            raise
        raise InputError(f"{job.name}: {cause}") from None
    finally:
        ray.kill(actor)


def _keep(uri: str, name: str) -> None:
    """Move the winner's weights to student/ and drop the others; object stores cannot move a folder."""
    store, root = filesystem(uri)
    store.create_dir(f"{root}/student")
    fs.copy_files(f"{root}/{FINISHED}/{name}", f"{root}/student", source_filesystem=store, destination_filesystem=store)
    store.delete_dir(f"{root}/{FINISHED}")
