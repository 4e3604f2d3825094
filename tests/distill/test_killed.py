"""Trials that go on from checkpoints, and a search and a capture whose driver is killed for real."""

from __future__ import annotations

import dataclasses
import json
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from distill_world import World, alive, capture, jobs, replica
from test_sweep import STEPS, STUDENTS, SWEEP, TUNE, job_of

from overproof.artifacts import Artifact, ArtifactWriter
from overproof.distill.optuna_study import STUDENT
from overproof.distill.student_trainer import StudentTrainer
from overproof.distill.sweep import sweep
from overproof.distill.sweep_state import SweepState
from overproof.distill.target_cache import TargetCache, TargetIndex
from overproof.distill.teacher_pool import finished_files
from overproof.distill.teacher_stages import cache_targets
from overproof.distill.trial_job import CurveSegment
from overproof.errors import InputError
from overproof.stage_context import NOTICE, StageContext


def to_end(run: StudentTrainer) -> list[CurveSegment]:
    segments = [run.run_to_validation()]
    while segments[-1].steps < STEPS:
        segments.append(run.run_to_validation())
    return segments


def kill(context: StageContext, address: str, folder: Path) -> None:
    """Run a stage in a process that is killed when a part of it is finished."""
    pickled = folder / "context"
    pickled.write_bytes(pickle.dumps(dataclasses.replace(context, progress=None)))
    driver = [sys.executable, str(Path(__file__).with_name("killed_driver.py")), address, str(pickled)]
    assert subprocess.run(driver, capture_output=True).returncode == -signal.SIGKILL
    for _ in range(300):  # its trials save until Ray ends them
        if not alive("Trainable"):
            return
        time.sleep(0.1)
    raise AssertionError("trials outlive their driver")


def half_written(context: StageContext) -> dict[str, int]:
    """The finished files of a killed capture of three, and when each was written; never all of them."""
    files = {path.name: path.stat().st_mtime_ns for path in Path(context.draft.workspace).glob("*/*.parquet")}
    if len(files) == 3:  # the teacher was faster than the kill
        Path(context.draft.workspace, context.draft.fingerprint, f"{files.popitem()[0]}.json").unlink()
    return files


def anew(world: World, context: StageContext) -> ArtifactWriter:
    """As the pipeline makes it: the unfinished draft is emptied, and its workspace stays."""
    draft = context.draft
    return world.store.begin(draft.recipe, draft.stage, draft.fingerprint, draft.config, draft.parents)


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
    state = Path(job.checkpoints.all()[-1].uri) / "state.pt"
    state.write_bytes(state.read_bytes()[:-9])
    second = StudentTrainer(job)
    assert second.resumed_step == done[1].steps
    assert "state.pt has" in second.faults[0]


def test_a_search_whose_driver_is_killed_goes_on_and_trains_no_trial_twice(
    ray_cluster: str, digits_world: World, digits_cache: Artifact, tmp_path: Path
) -> None:
    notices: list[str] = []

    def progress(task: str, done: int, total: int, note: str = "") -> None:
        if task == NOTICE:
            notices.append(note)

    search = {
        **TUNE,
        "search": {"kind": "tpe", "trials": 4, "startup_trials": 2},
        "space": {"learning_rate": {"kind": "log_uniform", "low": 1e-3, "high": 1e-1}},
    }
    changes = {"sweep": {**SWEEP, "students": STUDENTS[:1]}, "tune": search}
    context = digits_world.context("sweep", progress, digits_cache, **changes)
    kill(context, ray_cluster, tmp_path)
    state = SweepState(context.draft)
    begun = state.load_trials()
    reached = {name: state.checkpoints(name).committed() for name in begun}
    assert list(begun) == [f"wide-{number:03d}" for number in range(len(begun))]
    assert max(reached.values()) == STEPS
    again = anew(digits_world, context)
    metrics = sweep(dataclasses.replace(context, draft=again))
    trials = json.loads((Path(again.uri) / "trials.json").read_text())["trials"]
    assert metrics["trials"] == len(trials) == 4
    assert {trial["name"]: trial["resumed_step"] for trial in trials[: len(begun)]} == reached
    assert all(f"{name}: going on from step {step}" in notices for name, step in reached.items() if step)
    rates = [trial["values"]["learning_rate"] for trial in trials]
    assert rates[: len(begun)] == [values["learning_rate"] for values in begun.values()]
    assert len(set(rates)) == 4
    for name, rate in zip(begun, rates, strict=False):  # as one that nobody disturbed, to the last bit
        whole = to_end(StudentTrainer(job_of(context, "wide").with_values({"learning_rate": rate})))
        found, expected = curves(Path(again.uri))[name], [json.dumps(row) for part in whole for row in part.curve]
        assert found
        assert found == expected[: len(found)]


def test_a_capture_whose_driver_is_killed_does_no_finished_file_again(
    ray_cluster: str, digits_world: World, tmp_path: Path
) -> None:
    events: list[tuple[str, int, int, str]] = []
    context = digits_world.context("cache", lambda *event: events.append(event), cache={"actors": 1})
    kill(context, ray_cluster, tmp_path)
    files = half_written(context)
    again = anew(digits_world, context)
    metrics = cache_targets(dataclasses.replace(context, draft=again))
    assert events[0][0] == NOTICE
    assert events[0][3] == f"{len(files)} of 3 files were captured before"
    assert events[1][1] == events[0][1] > 0
    assert {name: (Path(again.uri) / name).stat().st_mtime_ns for name in files} == files
    whole = capture(digits_world, None).local()
    assert metrics["rows"] == events[-1][1] == TargetIndex.read(whole).rows
    ids = np.arange(metrics["rows"])
    for name, values in TargetCache(Path(again.uri)).take(ids).items():
        np.testing.assert_allclose(values, TargetCache(whole).take(ids)[name], rtol=1e-3, atol=1e-4)


def test_a_captured_file_that_was_damaged_is_captured_again(digits_world: World) -> None:
    teacher, index = replica(digits_world, None)
    list(teacher({"file": np.array([0, 1])}))
    assert list(finished_files(teacher.job)) == [file.path for file in index.files[:2]]
    path = Path(teacher.job.uri) / index.files[0].path
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert list(finished_files(teacher.job)) == [index.files[1].path]


def test_a_changed_sweep_does_not_go_on_from_anothers_trials(digits_world: World, digits_cache: Artifact) -> None:
    context = digits_world.context("sweep", cached=digits_cache, sweep=SWEEP, tune=TUNE)
    job = jobs(context)[0]
    SweepState(context.draft).record_trials({job.name: {STUDENT: job.name}})
    job.checkpoints.begin()
    first = StudentTrainer(job)
    first.run_to_validation()
    first.checkpoint_writer.wait()
    draft = digits_world.store.begin(context.draft.recipe, "sweep", "f" * 64, {"number": "other"}, {})
    changed = StageContext(context.recipe, context.parents, draft, context.progress)
    with pytest.raises(InputError, match=r"unfinished training, at step 7, whose recipe differs: number \d+, now"):
        sweep(changed)
