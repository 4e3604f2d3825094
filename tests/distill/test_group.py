"""Students that several workers train together: real ZeRO groups under Ray Train, in trials of a real sweep."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from distill_world import World, recipe_of
from ray._private.state import actors
from test_sweep import STEPS, STUDENTS, SWEEP, TUNE, job_of

from overproof.artifacts import Artifact
from overproof.cluster.placement import Capacity, NodeShape, resource_requests, why_unplaceable
from overproof.cluster.ray_cluster import relay_progress
from overproof.data.parquet_reader import Shards
from overproof.distill.student_trainer import StudentTrainer
from overproof.distill.sweep import sweep
from overproof.distill.tune_search import trial_slots
from overproof.errors import InputError
from overproof.models.hf_directory import load_model, to_tensors
from overproof.stage_context import ProgressEvent, TaskProgress
from overproof.train.loop import validation_ids, validation_loss

GROUP = {**SWEEP, "students": STUDENTS[:2], "group": {"workers": 2, "zero_stage": 2}}
SAME = 1e-3  # relative: sums over two ranks round otherwise


def alone(world: World, cached: Artifact) -> list[float]:
    """Validation losses of the first student, trained by one process without Ray."""
    run = StudentTrainer(job_of(world.context("sweep", cached=cached, sweep=SWEEP, tune=TUNE), "wide"))
    losses = []
    while not losses or losses[-1][0] < STEPS:
        part = run.run_to_validation()
        losses.append((part.steps, part.validation_loss))
    return [loss for _, loss in losses]


def curve(folder: Path, name: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "curves" / f"{name}.jsonl").read_text().splitlines()]


def losses(rows: list[dict[str, float]]) -> list[float]:
    return [row["validation_loss"] for row in rows if "validation_loss" in row]


def alive(name: str) -> list[int]:
    """Processes of the cluster's actors of a class."""
    return [a["Pid"] for a in actors().values() if a["State"] == "ALIVE" and name in a["ActorClassName"]]


@pytest.mark.usefixtures("ray_cluster")
def test_a_group_trains_what_one_process_trains_and_goes_on_after_its_trial_was_killed(
    digits_world: World, digits_cache: Artifact
) -> None:
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
    expected = alone(digits_world, digits_cache)
    trials: dict[str, Any] = {t["name"]: t for t in json.loads((folder / "trials.json").read_text())["trials"]}
    for name in ("wide", "twin"):
        rows = curve(folder, name)
        assert [row["step"] for row in rows if "loss" in row] == list(range(1, STEPS + 1))
        found = {row["step"]: row["validation_loss"] for row in rows if "validation_loss" in row}
        assert found[STEPS] == pytest.approx(expected[-1], rel=SAME)
        assert trials[name]["cpu_seconds"] > 0
    assert metrics["control_validation_loss"] > 0
    model = load_model(folder / "students" / metrics["winner"])
    shards = Shards(digits_world.root, "validation")
    rows = to_tensors(shards.take(validation_ids(shards.rows, 64)))
    assert validation_loss(model, digits_world.predict, [rows]) == pytest.approx(metrics["validation_loss"], rel=SAME)
    for _ in range(100):  # nothing of a group outlives its trial
        if not alive("RayTrainWorker") and not alive("TrainController"):
            return
        time.sleep(0.1)
    raise AssertionError("workers outlive their trials")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sweep": {**GROUP, "batch_size": 15}}, "batch_size 15 is not a multiple of group.workers 2"),
        ({"sweep": {**GROUP, "group": {"workers": 1}}}, "sweep.group.workers: found 1"),
        ({"sweep": {**GROUP, "group": {"zero_stage": 1, "offload": "parameters"}}}, "needs zero_stage 3; found 1"),
        (
            {"sweep": {**GROUP, "students": [{**STUDENTS[0], "states": {"weight": 1.0}}]}},
            "student wide has states, which one process alone can learn from; expected no group",
        ),
        (
            {"sweep": GROUP, "tune": {"space": {"batch_size": {"kind": "choice", "values": [16, 9]}}}},
            "student wide with batch_size 9 cannot be: batch_size 9 is not a multiple of group.workers 2",
        ),
        (
            {
                "sweep": {**GROUP, "students": STUDENTS[:1]},
                "tune": {
                    "scheduler": {"kind": "pbt", "interval_steps": 4},
                    "search": {"kind": "random", "trials": 2},
                    "space": {"learning_rate": {"kind": "log_uniform", "low": 1e-3, "high": 1e-1}},
                },
            },
            "expected no sweep.group",
        ),
    ],
)
def test_what_a_group_cannot_do_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        recipe_of("digits", **changes)


def test_as_many_groups_run_as_there_is_room_for() -> None:
    nodes = [{"CPU": 4.0}, {"CPU": 3.0, "GPU": 1.0}]
    assert trial_slots(recipe_of("digits", sweep=GROUP).sweep, nodes) == 3
    wide = {**GROUP, "group": {"workers": 2, "cpus_per_worker": 2}}
    assert trial_slots(recipe_of("digits", sweep=wide).sweep, nodes) == 1
    assert (
        trial_slots(recipe_of("digits", sweep={**GROUP, "group": {"workers": 4, "cpus_per_worker": 2}}).sweep, nodes)
        == 0
    )


def test_a_cluster_too_small_for_one_group_is_refused() -> None:
    recipe = recipe_of("digits", sweep={**GROUP, "group": {"workers": 4}}, tune=TUNE)
    found = {
        need.stage: why_unplaceable(need, Capacity((NodeShape("here", 3, 0, 1),), "this cluster has 3 CPUs"))
        for need in resource_requests(recipe)
    }
    assert found["sweep"] is not None
    assert "sweep: 1 to 2 trials of 4 workers need 4 x 1 = 4 CPUs at the same time" in found["sweep"]
