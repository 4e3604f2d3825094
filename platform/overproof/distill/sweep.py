"""The sweep stage: students trained from the one cache, then controls without the teacher, and which are kept."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pyarrow import fs

from overproof.artifacts import Artifact
from overproof.cluster.progress_relay import relay_progress
from overproof.config import Grid, OfTeacher, Pbt
from overproof.config.search import TrialValues, apply_values, varying_values
from overproof.data.manifest import Manifest
from overproof.distill.cache_checks import ROWS_CHECKED, check_rows, check_text
from overproof.distill.controls import control_job, train_controls
from overproof.distill.optuna_study import STUDENT, OptunaStudy
from overproof.distill.row_cache import teacher_folder
from overproof.distill.student_validation import absolute_student, check_student
from overproof.distill.sweep_state import StartedTrial, SweepState
from overproof.distill.sweep_tracker import SweepTracker
from overproof.distill.target_cache import TargetCache, target_key
from overproof.distill.teacher_pool import ScorerPool, scorer_pool
from overproof.distill.teacher_text import TeacherText, text_key
from overproof.distill.tensorboard import EVENTS, TrialEvents
from overproof.distill.trial_job import CONTROL, MAX_DEATHS, STUDENTS, TrialJob, rung_steps
from overproof.distill.tune_search import TrialRoom, run_trials
from overproof.errors import InputError
from overproof.files import filesystem
from overproof.ray_tasks import run_tasks
from overproof.stage_context import Notice, StageContext
from overproof.units import format_count


def sweep(context: StageContext) -> dict[str, Any]:
    """Train the students and the control; writes trials.json, curves/, events/, students/NAME/ of those kept, control/.

    What trials of an attempt that was killed have done is taken from their checkpoints in the draft's workspace. A
    trial that fails is recorded with its reason, and the others go on.

    Raises:
        InputError: the cache was made for another teacher or other data, or lacks rows; a student cannot start from
            what it names; the workspace holds a sweep of another recipe; no student could be trained to the end.
        RuntimeError: Ray Tune ended before its trials did.
    """
    with tempfile.TemporaryDirectory(prefix="overproof-curves-") as curves:
        return _sweep(context, Path(curves))


def _sweep(context: StageContext, curves: Path) -> dict[str, Any]:
    settings, search = context.recipe.sweep, context.recipe.tune
    check_cache(context)
    for student in settings.students:
        check_student(student, context.parents["prepare"], context.parents["train"], context.progress)
    state = SweepState(context.draft)
    previous = state.load_trials()
    _measure_teacher(context)
    max_deaths = 0 if isinstance(search.scheduler, Pbt) else MAX_DEATHS  # a population is proposed once
    tracker = SweepTracker(context.progress, search.most_steps(settings), search.trials(settings), max_deaths, curves)
    with relay_progress(tracker.show) as progress:
        with scorer_pool(context.recipe, context.parents["prepare"], context.parents["train"]) as scorer:
            jobs = train_students(replace(context, progress=progress), state, previous, tracker, scorer)
            scorer_counts = scorer.counts() if scorer else {}
        winner = tracker.winner()
        if winner is None:
            context.draft.clear_workspace()  # a sweep that failed like this would only fail again
            name, reason = next(iter(tracker.failures.items()))
            raise InputError(f"student {name}: {reason}; no student of the sweep ran every step")
        best_job = next(job for job in jobs if job.name == winner["name"])
        finished = tracker.finished()
        compared = [job for job in jobs if job.name in finished] if settings.controls == "every" else [best_job]
        controls = {job.name: control_job(job, state, best=job is best_job) for job in compared}
        train_controls(list(controls.values()), TrialRoom(settings), tracker)
    trials = [tracker.trial_entry(job) for job in jobs]
    control_trials = {name: tracker.trial_entry(job) for name, job in controls.items()}
    kept = pareto_students(trials, best_job.name, settings.keep)
    drop_students(context.draft.uri, kept)
    for name in (*kept, CONTROL):
        context.draft.hand_in(tracker.files[name])
    with context.draft.directory() as folder:
        shutil.copytree(curves, folder / "curves")
        shown = varying_values(settings, context.recipe.tune)
        for trial in (*trials, *control_trials.values()):
            _write_events(folder / EVENTS, trial, tracker, shown)
        content = {"winner": best_job.name, "kept": kept, "trials": trials, "control": control_trials[best_job.name],
                   "controls": control_trials}  # fmt: skip
        (folder / "trials.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return {
        "winner": best_job.name,
        "validation_loss": winner["validation_loss"],
        "control_validation_loss": tracker.last_results[CONTROL]["validation_loss"],
        "kept": len(kept),
        "trials": len(trials),
        "stopped_early": sum(trial["status"] == "stopped" for trial in trials),
        "failed": sum(trial["status"] == "failed" for trial in trials),
        "processes": len({trial["pid"] for trial in trials if trial["pid"]}),
        "steps": sum(trial["steps"] for trial in trials),
        **{f"scorer_{name}": count for name, count in scorer_counts.items()},
    }


def _measure_teacher(context: StageContext) -> None:
    """What of the teacher matters least, where students are pruned or masked: once, before they start side by side."""
    recipe, parents = context.recipe, context.parents
    models = [student.model for student in recipe.sweep.students if isinstance(student.model, OfTeacher)]
    asked = {model.measurement: model for model in models}  # one serves all of its students
    for measurement, model in asked.items():
        if measurement is not None:
            given = (model, parents["prepare"], parents["train"], context.draft.workspace, recipe.seed)
            rows = format_count(measurement.rows, "train row")
            context.progress(Notice(f"what of the teacher matters least, on {rows}"))
            run_tasks(_measure_trained, {f"{measurement.rows} rows": given})


def _measure_trained(model: OfTeacher, prepared: Artifact, trained: Artifact, workspace: str, seed: int) -> None:
    from overproof.distill.student_init import measured_teacher

    measured_teacher(model, teacher_folder(trained), prepared, workspace, seed)


def check_cache(context: StageContext) -> None:
    """Refuse a cache, or a text, that is not of this teacher and data, or that lacks something the sweep reads.

    Raises:
        InputError: what differs, or what is missing.
    """
    recipe, parents = context.recipe, context.parents
    prepared, teacher_text = parents["prepare"], parents.get("generate")
    order = Manifest.read(prepared).order(recipe.seed)
    sample_ids = order.rows_at(0, min(order.rows, recipe.rows_read))
    checked = sample_ids[:ROWS_CHECKED]
    if teacher_text:
        text = TeacherText(teacher_text)
        text.index.check(text_key(recipe, prepared, parents["train"]))
        text.require(sample_ids)
        check_text(text, prepared, checked)
    if not recipe.reads_cache:
        return
    targets = TargetCache(parents["cache"])
    targets.index.check(target_key(recipe, prepared, parents["train"], teacher_text))
    for temperature in recipe.temperatures:
        targets.index.require_temperature(temperature)
    targets.require(sample_ids)
    check_rows(targets.source, prepared, checked, teacher_text)


def make_trial_job(
    context: StageContext, state: SweepState, name: str, values: TrialValues, scorer: ScorerPool | None = None
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
        rungs=frozenset(rung_steps(context.recipe.tune.scheduler, settings)),
        seed=context.recipe.seed,
        threads=max(1, int(settings.cpus_per_trial)),
        prepared=parents["prepare"],
        trained=parents["train"],
        target_cache=parents.get("cache"),
        teacher_text=parents.get("generate"),
        draft=context.draft,
        folder=f"{STUDENTS}/{name}",
        checkpoints=state.checkpoints(name),
        replay_history=not isinstance(context.recipe.tune.scheduler, Pbt),
        scorer=scorer,
        scorer_temperatures=context.recipe.scorer_temperatures,
        progress=context.progress,
    )


def train_students(
    context: StageContext,
    state: SweepState,
    previous: Mapping[str, TrialValues],
    tracker: SweepTracker,
    scorer: ScorerPool | None,
) -> list[TrialJob]:
    """Run every trial of the search, those of a previous attempt first; gives their jobs."""
    settings, search = context.recipe.sweep, context.recipe.tune
    trials_are_students = not search.space.domains and isinstance(search.search, Grid)
    started: list[StartedTrial] = []
    jobs: list[TrialJob] = []

    def start_trial(values: TrialValues) -> TrialJob:
        name = values[STUDENT] if trials_are_students else f"{values[STUDENT]}-{len(jobs):03d}"
        started.append((name, values))
        if name not in previous:
            state.record_trials(started)
        job = make_trial_job(context, state, name, values, scorer)
        job.checkpoints.claim_folder()
        jobs.append(job)
        tracker.add_trial(name, job.settings.steps)
        return job

    study = OptunaStudy(search, settings, context.recipe.seed, list(previous.values()))
    run_trials(context, study, start_trial, tracker)
    return jobs


def pareto_students(trials: Sequence[Mapping[str, Any]], winner: str, most: int) -> list[str]:
    """Of the trials that ran every step, those that none beats in validation loss and parameters at once.

    Best loss first, so the winner always is the first; at most ``most``. Of equals the first is taken.
    """
    finished = [trial for trial in trials if trial["status"] == "finished"]
    ranked = sorted(finished, key=lambda t: (t["validation_loss"], t["name"] != winner, t["parameters"]))
    kept: list[Mapping[str, Any]] = []
    for trial in ranked:
        if not kept or trial["parameters"] < kept[-1]["parameters"]:
            kept.append(trial)
    return [str(trial["name"]) for trial in kept[:most]]


def drop_students(uri: str, kept: Sequence[str]) -> None:
    """Delete the weights of all but these: each was written where it stays, for object stores cannot move a folder."""
    store, root = filesystem(uri)
    for info in store.get_file_info(fs.FileSelector(f"{root}/{STUDENTS}")):
        if info.base_name not in kept:
            store.delete_dir(info.path)


def _write_events(folder: Path, trial: Mapping[str, Any], tracker: SweepTracker, shown: Container[str]) -> None:
    settings = {name: value for name, value in trial["values"].items() if name in shown}
    settings |= {"teacher_weight": trial["teacher_weight"], "status": trial["status"]}
    with TrialEvents(folder / trial["name"], settings) as events:
        events.add(tracker.read_curve(trial["name"]))
        if trial["status"] != "failed":
            events.succeed()
