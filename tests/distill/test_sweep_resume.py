"""What a killed attempt leaves: trials, searches and captures go on from it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from distill_world import SEED, World, jobs, replica
from test_sweep import STEPS, STUDENTS, SWEEP, TUNE, job_of

from overproof.artifacts import Artifact, ArtifactWriter
from overproof.distill.optuna_study import STUDENT, OptunaStudy
from overproof.distill.student_trainer import StudentTrainer
from overproof.distill.sweep import make_trial_job, sweep, train_students
from overproof.distill.sweep_state import SweepState
from overproof.distill.sweep_tracker import SweepTracker
from overproof.distill.teacher_pool import finished_files
from overproof.distill.trial_job import MAX_DEATHS, CurveSegment
from overproof.errors import InputError
from overproof.stage_context import Notice, ProgressEvent, StageContext


def to_end(run: StudentTrainer) -> list[CurveSegment]:
    segments = [run.run_to_validation()]
    while segments[-1].steps < STEPS:
        segments.append(run.run_to_validation())
    return segments


def anew(world: World, context: StageContext) -> ArtifactWriter:
    """As the pipeline makes it: the unfinished draft is emptied, and its workspace stays."""
    draft = context.draft
    return world.store.new_writer(draft.recipe, draft.stage, draft.fingerprint, draft.config, draft.parents)


def curves(folder: Path) -> dict[str, list[str]]:
    files = (folder / "curves").glob("*.jsonl")
    return {path.stem: path.read_text().splitlines() for path in files if path.stem != "control"}


def test_a_student_goes_on_from_its_checkpoint_to_the_last_bit(digits_world: World, digits_cache: Artifact) -> None:
    context = digits_world.context("sweep", cached=digits_cache, sweep=SWEEP, tune=TUNE)
    whole, job = StudentTrainer(job_of(context, "wide")), job_of(context, "wide")
    expected = to_end(whole)
    first = StudentTrainer(job)
    done = [first.run_to_validation() for _ in range(3)]
    first.checkpoint_writer.wait()
    second = StudentTrainer(job)
    assert second.resumed_step == done[-1].steps
    assert to_end(second) == expected
    assert all(a.equal(b) for a, b in zip(second.model.parameters(), whole.model.parameters(), strict=True))
    second.checkpoint_writer.wait()
    third = StudentTrainer(job)
    assert third.resumed_step == STEPS
    assert to_end(third) == expected
    assert third.seconds == second.seconds


def test_a_damaged_checkpoint_is_not_used(digits_world: World, digits_cache: Artifact) -> None:
    context = digits_world.context("sweep", cached=digits_cache, sweep=SWEEP, tune=TUNE)
    job = job_of(context, "wide")
    first = StudentTrainer(job)
    done = [first.run_to_validation() for _ in range(3)]
    first.checkpoint_writer.wait()
    state = Path(job.checkpoints.all_committed()[-1].uri) / "state.pt"
    state.write_bytes(state.read_bytes()[:-9])
    second = StudentTrainer(job)
    assert second.resumed_step == done[1].steps
    assert "state.pt has" in second.faults[0]


@pytest.mark.trial
@pytest.mark.usefixtures("ray_cluster")
def test_a_search_goes_on_from_what_a_killed_driver_left_and_trains_no_trial_twice(
    digits_world: World, digits_cache: Artifact, tmp_path: Path
) -> None:
    """One trial done, one begun; drivers are really killed among the trials."""
    notices: list[str] = []

    def progress(event: ProgressEvent) -> None:
        if isinstance(event, Notice):
            notices.append(event.text)

    search = {
        **TUNE,
        "search": {"kind": "tpe", "trials": 3, "startup_trials": 2},
        "space": {"learning_rate": {"kind": "log_uniform", "low": 1e-3, "high": 1e-1}},
    }
    one = {**SWEEP, "students": STUDENTS[:1], "concurrent_trials": 1}
    context = digits_world.context("sweep", progress, digits_cache, sweep=one, tune=search)
    state, study = SweepState(context.draft), OptunaStudy(context.recipe.tune, context.recipe.sweep, SEED)
    names = ("wide-000", "wide-001")
    values = {name: study.ask(name) or {} for name in names}
    for count in (1, 2):
        state.record_trials(list(values.items())[:count])
    left: dict[str, list[CurveSegment]] = {}
    for name in names:
        job = make_trial_job(context, state, name, values[name])
        job.checkpoints.claim_folder()
        student = StudentTrainer(job)
        left[name] = to_end(student) if name == "wide-000" else [student.run_to_validation()]
        student.checkpoint_writer.wait()
    again = dataclasses.replace(context, draft=anew(digits_world, context))
    before = SweepState(again.draft).load_trials()
    assert before == values
    tracker = SweepTracker(progress, STEPS, 3, MAX_DEATHS, tmp_path)
    entries = [
        tracker.trial_entry(job) for job in train_students(again, SweepState(again.draft), before, tracker, None)
    ]
    assert [(entry["name"], entry["resumed_step"]) for entry in entries] == [
        ("wide-000", STEPS), ("wide-001", 7), ("wide-002", 0),
    ]  # fmt: skip
    assert all(f"{name}: going on from step {step}" in notices for name, step in zip(names, (STEPS, 7), strict=True))
    assert [entry["values"]["learning_rate"] for entry in entries[:2]] == [
        values[name]["learning_rate"] for name in names
    ]
    assert len({entry["values"]["learning_rate"] for entry in entries}) == 3
    for name, segments in left.items():  # its rows are those that were there before
        rows = [row for segment in segments for row in segment.curve]
        told = tracker.read_curve(name)
        assert told[: len(rows)] == rows[: len(told)]


def test_a_captured_file_that_was_damaged_is_captured_again(digits_world: World) -> None:
    teacher, index = replica(digits_world, None)
    list(teacher({"file": np.array([0, 1])}))
    assert list(finished_files(teacher.job)) == [file.path for file in index.files[:2]]
    path = Path(teacher.job.draft.uri) / index.files[0].path
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert list(finished_files(teacher.job)) == [index.files[1].path]


def test_a_changed_sweep_does_not_go_on_from_anothers_trials(digits_world: World, digits_cache: Artifact) -> None:
    context = digits_world.context("sweep", cached=digits_cache, sweep=SWEEP, tune=TUNE)
    job = jobs(context)[0]
    SweepState(context.draft).record_trials([(job.name, {STUDENT: job.name})])
    job.checkpoints.claim_folder()
    first = StudentTrainer(job)
    first.run_to_validation()
    first.checkpoint_writer.wait()
    draft = digits_world.store.new_writer(context.draft.recipe, "sweep", "f" * 64, {"number": "other"}, {})
    changed = StageContext(context.recipe, context.parents, draft, context.progress)
    with pytest.raises(InputError, match=r"unfinished training, at step 7, whose recipe differs: number \d+, now"):
        sweep(changed)
