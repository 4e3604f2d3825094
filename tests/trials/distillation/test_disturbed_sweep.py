"""A sweep with a student that fails, of which a trial and a control are killed: the others change by nothing."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path

import pytest
from distill_world import World, alive
from test_sweep import STEPS, STUDENTS, SWEEP, WILD, Swept, job_of

from overproof.artifacts import Artifact
from overproof.distill.student_trainer import StudentTrainer
from overproof.distill.sweep import sweep
from overproof.stage_context import ProgressEvent, TaskProgress

pytestmark = pytest.mark.trial


@pytest.fixture(scope="module")
def disturbed(ray_cluster: str, digits_world: World, digits_cache: Artifact) -> Swept:
    """A sweep with a student that fails, of which a process that trains and one that trains a control are killed."""
    killed: dict[str, int] = {}

    def progress(event: ProgressEvent) -> None:
        if not isinstance(event, TaskProgress):
            return
        if (
            event.task == "sweep" and event.done > STEPS and "Trainable" not in killed
        ):  # one has failed, another has begun
            killed["Trainable"] = alive("Trainable")[0]
            os.kill(killed["Trainable"], signal.SIGKILL)
        if event.task == "control" and event.done and "InProcessTrainer" not in killed:
            killed["InProcessTrainer"] = alive("InProcessTrainer")[0]
            os.kill(killed["InProcessTrainer"], signal.SIGKILL)

    changes = {**SWEEP, "students": [STUDENTS[0], WILD, STUDENTS[3]], "controls": "every"}
    context = digits_world.context("sweep", progress, digits_cache, sweep=changes)
    metrics = sweep(context)
    assert len(killed) == 2
    return Swept(context, Path(context.draft.uri), metrics, [], "", set())


def test_a_student_that_fails_is_recorded_and_the_others_go_on(disturbed: Swept) -> None:
    wide, wild, narrow = disturbed.trials["trials"]
    assert (wild["status"], wild["steps"], wild["validation_loss"]) == ("failed", 0, None)
    assert wild["reason"].startswith("step 1: loss is")
    for trial in (wide, narrow):
        assert (trial["status"], trial["reason"]) == ("finished", None)
    assert disturbed.trials["winner"] in ("wide", "narrow")
    assert (disturbed.metrics["failed"], disturbed.metrics["trials"]) == (1, 3)


def test_a_trial_whose_process_is_killed_goes_on(disturbed: Swept) -> None:
    for name in ("wide", "narrow"):
        student = StudentTrainer(job_of(disturbed.context, name))
        assert disturbed.curve(name) == [row for _ in range(4) for row in student.run_to_validation().curve]


def test_every_student_may_have_a_control_of_its_own(disturbed: Swept) -> None:
    trials = disturbed.trials
    assert list(trials["controls"]) == ["wide", "narrow"]
    assert trials["controls"][trials["winner"]] == trials["control"]
    names = {control["name"] for control in trials["controls"].values()}
    assert names == {"control", "control-narrow" if trials["winner"] == "wide" else "control-wide"}
    for name, control in trials["controls"].items():
        alone = StudentTrainer(dataclasses.replace(job_of(disturbed.context, name), distilled=False))
        rows = [row for _ in range(4) for row in alone.run_to_validation().curve]
        assert disturbed.curve(control["name"]) == rows  # bit for bit, the killed one as well
        assert control["parameters"] == alone.parameters
    found = {path.name for path in disturbed.folder.iterdir()}
    assert found == {"students", "control", "curves", "events", "trials.json"}
