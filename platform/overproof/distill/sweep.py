"""The sweep stage: Ray Tune trains students on the one cache, then controls without the teacher."""

from __future__ import annotations

import json
import logging
import os
import secrets
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from pyarrow import fs
from ray import tune

from overproof.cluster.placement import Resources, count_fitting
from overproof.cluster.ray_cluster import preserve_sigint
from overproof.config import Grid, Pbt, Sweep
from overproof.config.search import TrialValues, apply_values
from overproof.data.manifest import Manifest
from overproof.distill.cache_checks import ROWS_CHECKED, check_rows, check_text
from overproof.distill.controls import control_job, train_controls
from overproof.distill.optuna_study import STUDENT, OptunaStudy
from overproof.distill.pareto_selection import pareto_students, publish_students
from overproof.distill.scorer_pool import ScorerPool, scorer_pool
from overproof.distill.student_validation import absolute_student, check_student
from overproof.distill.sweep_state import SweepState
from overproof.distill.sweep_tracker import SweepTracker
from overproof.distill.target_cache import TargetCache, target_key
from overproof.distill.teacher_text import TeacherText, text_key
from overproof.distill.tensorboard import EVENTS, TensorBoardCallback, append_events
from overproof.distill.trial_job import CONTROL, FINISHED, MAX_DEATHS, TrialJob, rung_steps
from overproof.distill.tune_search import OptunaSearcher, tune_scheduler
from overproof.distill.tune_trial import TuneTrial
from overproof.errors import InputError
from overproof.files import filesystem, join_uri
from overproof.stage_context import StageContext, no_progress

QUIET = {"RAY_AIR_NEW_OUTPUT": "0", "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1"}


def sweep(context: StageContext) -> dict[str, Any]:
    """Train the students and the control; writes trials.json, curves/, events/, students/NAME/ of those kept, control/.

    What trials of an attempt that was killed have done is taken from their checkpoints in the draft's workspace. A
    trial that fails is recorded with its reason, and the others go on.

    Raises:
        InputError: the cache was made for another teacher or other data, or lacks rows; a student cannot start from
            what it names; the workspace holds a sweep of another recipe; no student could be trained to the end.
    """
    settings, tune_ = context.recipe.sweep, context.recipe.tune
    check_cache(context)
    for student in settings.students:
        check_student(student, context.parents["prepare"], context.parents["train"])
    journal = SweepState(context.draft)
    before = journal.begin()
    total = tune_.trials(settings)
    proposals = 0 if isinstance(tune_.scheduler, Pbt) else MAX_DEATHS  # a population is proposed once
    watch = SweepTracker(context.progress, settings.steps, total, proposals)
    with scorer_pool(context.recipe, context.parents["train"]) as pool:
        students = _tune(context, journal, before, watch, pool)
        judged = pool.counts() if pool else {}
    winner = watch.winner()
    if winner is None:
        context.draft.clear_workspace()  # a sweep that failed like this would only fail again
        name, reason = next(iter(watch.failed.items()))
        raise InputError(f"student {name}: {reason}; no student of the sweep ran every step")
    chosen = next(job for job in students if job.name == winner["name"])
    finished = watch.finished()
    compared = [job for job in students if job.name in finished] if settings.controls == "every" else [chosen]
    controls = {job.name: control_job(job, journal, best=job is chosen) for job in compared}
    train_controls(list(controls.values()), _at_once(settings), watch)
    trials = [watch.trial(job) for job in students]
    kept = pareto_students(trials, chosen.name, settings.keep)
    publish_students(context.draft.uri, kept)
    with context.draft.directory() as folder:
        watch.write(folder / "curves")
        alone = {name: watch.trial(job) for name, job in controls.items()}
        content = {"winner": chosen.name, "kept": kept, "trials": trials, "control": alone[chosen.name],
                   "controls": alone}  # fmt: skip
        for entry in (*trials, *alone.values()):
            values = entry["values"] | {"teacher_weight": entry["teacher_weight"]}
            append_events(folder / EVENTS / entry["name"], watch.curves.get(entry["name"], ()), values, entry["status"])
        (folder / "trials.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return {
        "winner": chosen.name,
        "validation_loss": winner["validation_loss"],
        "control_validation_loss": watch.last[CONTROL]["validation_loss"],
        "kept": len(kept),
        "trials": len(trials),
        "stopped_early": sum(trial["status"] == "stopped" for trial in trials),
        "failed": sum(trial["status"] == "failed" for trial in trials),
        "processes": len({trial["pid"] for trial in trials if trial["pid"]}),
        "steps": sum(trial["steps"] for trial in trials),
        **{f"judged_{name}": count for name, count in judged.items()},
    }


def check_cache(context: StageContext) -> None:
    """Refuse a cache, or a text, that is not of this teacher and data, or that lacks something the sweep reads.

    Raises:
        InputError: what differs, or what is missing.
    """
    recipe, parents = context.recipe, context.parents
    prepared, written = parents["prepare"], parents.get("generate")
    order = Manifest.read(prepared.local()).order(recipe.seed)
    ids = order.rows_at(0, min(order.rows, recipe.rows_read))
    if written:
        text = TeacherText(written.local())
        text.index.check(text_key(recipe, prepared, parents["train"]))
        text.require(ids)
        check_text(text, prepared.local(), ids[:ROWS_CHECKED])
    if not recipe.reads_cache:
        return
    targets = TargetCache(parents["cache"].local())
    targets.index.check(target_key(recipe, prepared, parents["train"], written))
    for temperature in recipe.temperatures:
        targets.index.require_temperature(temperature)
    targets.require(ids)
    check_rows(targets.root, prepared.local(), ids[:ROWS_CHECKED], written.local() if written else None)


def _at_once(settings: Sweep) -> int:
    """Trials to run at the same time on the cluster as it is."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    return min(settings.concurrent_trials, max(1, trial_slots(settings, nodes)))


def trial_slots(settings: Sweep, nodes: Sequence[Resources]) -> int:
    """Trials that fit the nodes (their resources) at the same time; each bundle of one lies within a node."""
    each, cpus, gpus = settings.bundles
    return count_fitting(nodes, {"CPU": cpus, "GPU": gpus}) // each


def make_trial_job(
    context: StageContext, journal: SweepState, name: str, values: TrialValues, pool: ScorerPool | None = None
) -> TrialJob:
    """A trial: the student that ``values`` name, with the others of them in place of its own."""
    sweep, parents = context.recipe.sweep, context.parents
    base = next(student for student in sweep.students if student.name == values[STUDENT])
    settings, student = apply_values(sweep, base, values)
    return TrialJob(
        name=name,
        student=absolute_student(student),
        distilled=student.distilled,
        settings=settings,
        rungs=frozenset(rung_steps(context.recipe.tune.scheduler, settings.steps)),
        seed=context.recipe.seed,
        threads=max(1, int(settings.cpus_per_trial)),
        prepared=parents["prepare"],
        trained=parents["train"],
        cached=parents.get("cache"),
        draft=context.draft,
        folder=f"{FINISHED}/{name}",
        checkpoints=journal.checkpoints(name),
        retold=not isinstance(context.recipe.tune.scheduler, Pbt),
        judged=context.recipe.judged_temperatures,
        pool=pool,
        progress=context.progress if settings.group else no_progress,
        written=parents.get("generate"),
    )


def _resources(settings: Sweep) -> Any:
    """What Tune reserves for a trial; a group reserves its own, and Tune insists on something."""
    if settings.group:
        return tune.PlacementGroupFactory([{"memory": 1}])
    return {"cpu": settings.cpus_per_trial, "gpu": settings.gpus_per_trial}


def _tune(
    context: StageContext,
    journal: SweepState,
    before: Mapping[str, TrialValues],
    watch: SweepTracker,
    pool: ScorerPool | None,
) -> list[TrialJob]:
    """Run trial after trial until the scheduler stops it, it fails, or it has run every step; gives their jobs.

    A trial whose process dies is started again, and goes on from its checkpoint.
    """
    settings, search = context.recipe.sweep, context.recipe.tune
    named = not search.space.domains and isinstance(search.search, Grid)  # trials are the students themselves
    begun: dict[str, TrialValues] = {}
    jobs: list[TrialJob] = []

    def begin(values: TrialValues) -> TrialJob:
        name = values[STUDENT] if named else f"{values[STUDENT]}-{len(jobs):03d}"
        begun[name] = values
        if name not in before:
            journal.note(dict(begun))
        jobs.append(make_trial_job(context, journal, name, values, pool))
        jobs[-1].checkpoints.claim_folder()
        watch.begin(name)
        return jobs[-1]

    study = OptunaStudy(search, settings, context.recipe.seed, list(before.values()))
    population: dict[str, Any] = {}
    if isinstance(search.scheduler, Pbt):  # Ray's takes trials from no search
        study_of = iter(lambda: study.ask(""), None)
        population = {"job": tune.grid_search([begin(values) for values in study_of if values])}
    with _scratch(context, shared=bool(population)) as scratch, _tame():
        tune.Tuner(
            tune.with_resources(TuneTrial, _resources(settings)),
            param_space=population,
            tune_config=tune.TuneConfig(
                search_alg=None if population else OptunaSearcher(study, begin, watch.failed.__contains__),
                scheduler=tune_scheduler(search, settings.steps, context.recipe.seed),
                num_samples=1 if population else watch.trials * (1 + MAX_DEATHS),
                max_concurrent_trials=_at_once(settings),
                reuse_actors=settings.group is None,  # a group ends with its trial
            ),
            run_config=tune.RunConfig(
                name="sweep",
                storage_path=scratch[1],
                storage_filesystem=scratch[0],
                verbose=0,
                callbacks=[watch, TensorBoardCallback(context.draft)],
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # a finished trial wrote its weights
                failure_config=tune.FailureConfig(max_failures=MAX_DEATHS),
            ),
        ).fit()
    if len(watch.over) < watch.trials:
        raise KeyboardInterrupt
    return jobs


@contextmanager
def _scratch(context: StageContext, shared: bool) -> Iterator[tuple[fs.FileSystem | None, str]]:
    """Where Tune keeps its notes; states that trials take over from each other must be seen from every node."""
    if not shared:
        with tempfile.TemporaryDirectory(prefix="overproof-sweep-") as folder:
            yield None, folder
        return
    store, path = filesystem(join_uri(context.draft.workspace, f"tune-{secrets.token_hex(4)}"))
    store.create_dir(path, recursive=True)
    yield (None if isinstance(store, fs.LocalFileSystem) else store), path
    store.delete_dir(path)


@contextmanager
def _tame() -> Iterator[None]:
    """Tune prints tables at any verbosity and logs each trial to files."""
    logger = logging.getLogger("ray.tune")
    before, level = {name: os.environ.get(name) for name in QUIET}, logger.level
    os.environ.update(QUIET)
    logger.setLevel(logging.CRITICAL)  # errors are raised, with the student's name
    try:
        with preserve_sigint():
            yield
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
