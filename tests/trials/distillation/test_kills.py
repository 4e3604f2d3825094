"""Sweeps and captures of which a node, the driver, the teachers or a group of workers are killed while they run."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distill_world import World, alive, capture, finish, jobs, writer
from test_distributed_student import GROUP, SAME, curve, validation_losses_alone
from test_on_policy import ASKED, scorer, steps, writers
from test_sweep import STEPS, STUDENTS, SWEEP, TUNE, check_that_laggards_are_stopped, job_of
from test_sweep_resume import anew, curves, to_end
from test_teacher_text import ALONE, with_text

from overproof.artifacts import Artifact
from overproof.cluster.progress_relay import relay_progress
from overproof.data.parquet_reader import Shards
from overproof.distill.student_trainer import StudentTrainer
from overproof.distill.sweep import sweep
from overproof.distill.sweep_state import SweepState
from overproof.distill.target_cache import TargetCache, TargetIndex
from overproof.distill.teacher_stages import cache_targets, generate_text
from overproof.distill.teacher_text import TeacherText
from overproof.models.hf_directory import load_model, to_tensors
from overproof.stage_context import Notice, ProgressEvent, StageContext, TaskProgress
from overproof.train.loop import validation_ids, validation_loss

pytestmark = pytest.mark.trial


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


@pytest.fixture(scope="module")
def whole_curves(digits_world: World, digits_cache: Artifact) -> dict[str, list[str]]:
    """Of every student, trained alone to the end."""
    context = digits_world.context("sweep", cached=digits_cache, sweep=SWEEP, tune=TUNE)
    segments = {job.name: to_end(StudentTrainer(job_of(context, job.name))) for job in jobs(context)}
    return {name: [json.dumps(row) for segment in of for row in segment.curve] for name, of in segments.items()}


def same_steps(found: dict[str, list[str]], expected: dict[str, list[str]]) -> bool:
    """Whether each curve begins as the other one does, to the last bit; where trials are stopped may differ."""
    assert found.keys() == expected.keys()
    both = {name: min(len(found[name]), len(expected[name])) for name in found}
    return all(found[name][:n] == expected[name][:n] and n for name, n in both.items())


def test_a_sweep_whose_driver_is_killed_trains_no_student_twice(
    ray_cluster: str, whole_curves: dict[str, list[str]], digits_world: World, digits_cache: Artifact, tmp_path: Path
) -> None:
    notices: list[str] = []

    def progress(event: ProgressEvent) -> None:
        if isinstance(event, Notice):
            notices.append(event.text)

    context = digits_world.context("sweep", progress, digits_cache, sweep=SWEEP, tune=TUNE)
    kill(context, ray_cluster, tmp_path)
    before = {job.name: job.checkpoints.committed_step() for job in jobs(context)}
    assert max(before.values()) == STEPS
    again = anew(digits_world, context)
    sweep(dataclasses.replace(context, draft=again))
    trials = json.loads((Path(again.uri) / "trials.json").read_text())["trials"]
    assert {trial["name"]: trial["resumed_step"] for trial in trials} == before
    assert all(f"{name}: going on from step {step}" in notices for name, step in before.items() if step)
    assert same_steps(curves(Path(again.uri)), whole_curves)


def test_a_sweep_goes_on_without_a_node_that_dies(
    whole_curves: dict[str, list[str]], digits_world: World, digits_cache: Artifact, tmp_path: Path
) -> None:
    context = digits_world.context("sweep", cached=digits_cache, sweep=SWEEP, tune=TUNE)
    pickled = tmp_path / "context"
    pickled.write_bytes(pickle.dumps(dataclasses.replace(context, progress=None)))
    driver = [sys.executable, str(Path(__file__).with_name("node_driver.py")), str(pickled)]
    done = subprocess.run(driver, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = next(json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"killed"'))
    assert len(found["killed"]) == 1
    assert (found["trials"], found["failed"]) == (len(STUDENTS), 0)
    assert same_steps(curves(Path(context.draft.uri)), whole_curves)


def test_a_search_whose_driver_is_killed_goes_on_and_trains_no_trial_twice(
    ray_cluster: str, digits_world: World, digits_cache: Artifact, tmp_path: Path
) -> None:
    notices: list[str] = []

    def progress(event: ProgressEvent) -> None:
        if isinstance(event, Notice):
            notices.append(event.text)

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
    reached = {name: state.checkpoints(name).committed_step() for name in begun}
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
    events: list[ProgressEvent] = []
    context = digits_world.context("cache", events.append, cache={"actors": 1})
    kill(context, ray_cluster, tmp_path)
    files = half_written(context)
    again = anew(digits_world, context)
    metrics = cache_targets(dataclasses.replace(context, draft=again))
    assert events[0] == Notice(f"{len(files)} of 3 files were captured before")
    progress = [event for event in events if isinstance(event, TaskProgress)]
    assert progress[0].done > 0
    assert {name: (Path(again.uri) / name).stat().st_mtime_ns for name in files} == files
    whole = capture(digits_world, None).local()
    assert metrics["rows"] == progress[-1].done == TargetIndex.read(whole).rows
    ids = np.arange(metrics["rows"])
    for name, values in TargetCache(Path(again.uri)).take(ids).items():
        np.testing.assert_allclose(values, TargetCache(whole).take(ids)[name], rtol=1e-3, atol=1e-4)


def test_text_whose_driver_is_killed_writes_no_finished_file_again(
    ray_cluster: str, text_world: World, tmp_path: Path
) -> None:
    events: list[ProgressEvent] = []
    sections = with_text(ALONE, actors=1)
    context = text_world.context("generate", events.append, **sections)
    kill(context, ray_cluster, tmp_path)
    files = half_written(context)
    again = anew(text_world, context)
    metrics = generate_text(dataclasses.replace(context, draft=again))
    assert events[0] == Notice(f"{len(files)} of 3 files were captured before")
    progress = [event for event in events if isinstance(event, TaskProgress)]
    assert (progress[0].task, progress[0].note) == ("generate", "starting 1 teachers")
    assert progress[-1].note.endswith(" tokens/s")
    assert {name: (Path(again.uri) / name).stat().st_mtime_ns for name in files} == files
    assert (metrics["rows"], metrics["tokens"], metrics["actors"]) == (96, 96 * 12, 1)
    assert sorted(path.name for path in Path(again.uri).iterdir()) == [f"0000{n}.parquet" for n in range(3)] + [
        "text.json"
    ]
    ids, whole = np.arange(96), finish(writer(text_world, None)).local()
    np.testing.assert_array_equal(
        TeacherText(Path(again.uri)).take(ids)["tokens"], TeacherText(whole).take(ids)["tokens"]
    )


@pytest.mark.usefixtures("ray_cluster")
def test_teachers_and_trials_that_are_killed_change_nothing(text_world: World) -> None:
    killed: dict[str, int] = {}

    def progress(event: ProgressEvent) -> None:
        if isinstance(event, TaskProgress) and event.task == "sweep" and event.done:
            for name in ("Trainable", "ScorerWorker"):
                if name not in killed and (pids := alive(name)):
                    killed[name] = pids[0]
                    os.kill(pids[0], signal.SIGKILL)

    hasty = {**writers(), "on_policy": {**ASKED, "wait_s": 0.01}}
    context = text_world.context("sweep", progress, capture(text_world, None), sweep=hasty)
    metrics = sweep(context)
    assert len(killed) == 2
    assert (metrics["failed"], metrics["stopped_early"]) == (0, 0)
    for name in ("one", "two"):
        lines = (Path(context.draft.uri) / "curves" / f"{name}.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == steps(StudentTrainer(job_of(context, name), scorer(text_world)))
    assert not alive("ScorerWorker", "Batcher")


@pytest.mark.usefixtures("ray_cluster")
def test_a_group_goes_on_after_its_trial_was_killed(digits_world: World, digits_cache: Artifact) -> None:
    """While both trials run, a process of one of them is killed: the trial's own, with which its workers end."""
    killed: list[int] = []

    def progress(event: ProgressEvent) -> None:
        if isinstance(event, TaskProgress) and event.task == "sweep" and event.done and not killed:
            killed.append(alive("Trainable")[-1])
            os.kill(killed[0], signal.SIGKILL)

    with relay_progress(progress) as relayed:  # as the pipeline does: workers tell what happens to them
        context = digits_world.context("sweep", relayed, digits_cache, sweep=GROUP, tune={})
        metrics = sweep(context)
    folder = Path(context.draft.uri)
    assert killed
    assert (metrics["trials"], metrics["failed"]) == (2, 0)
    expected = validation_losses_alone(digits_world, digits_cache)
    trials: dict[str, Any] = {t["name"]: t for t in json.loads((folder / "trials.json").read_text())["trials"]}
    for name in ("wide", "twin"):
        rows = curve(folder, name)
        assert [row["step"] for row in rows if "loss" in row] == list(range(1, STEPS + 1))
        found = {row["step"]: row["validation_loss"] for row in rows if "validation_loss" in row}
        assert found[STEPS] == pytest.approx(expected[STEPS], rel=SAME)
        assert trials[name]["cpu_seconds"] > 0
    assert metrics["control_validation_loss"] > 0
    model = load_model(folder / "students" / metrics["winner"])
    shards = Shards(digits_world.root, "validation")
    batch = to_tensors(shards.take(validation_ids(shards.rows, 64)))
    assert validation_loss(model, digits_world.predict, [batch]) == pytest.approx(metrics["validation_loss"], rel=SAME)
    for _ in range(100):  # nothing of a group outlives its trial
        if not alive("RayTrainWorker", "TrainController"):
            return
        time.sleep(0.1)
    raise AssertionError("workers outlive their trials")


@pytest.mark.usefixtures("ray_cluster")
def test_hyperband_stops_what_lags_behind(digits_world: World, digits_cache: Artifact, tmp_path: Path) -> None:
    rule = {"kind": "hyperband", "grace_steps": 7, "brackets": 2}
    check_that_laggards_are_stopped(rule, digits_world, digits_cache, tmp_path)


@pytest.mark.usefixtures("ray_cluster")
def test_the_median_rule_stops_what_lags_behind(digits_world: World, digits_cache: Artifact, tmp_path: Path) -> None:
    rule = {"kind": "median", "grace_steps": 7, "least_trials": 2}
    check_that_laggards_are_stopped(rule, digits_world, digits_cache, tmp_path)
