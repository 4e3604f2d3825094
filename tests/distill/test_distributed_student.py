"""Students that several workers train together: a real ZeRO group under Ray Train."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from distill_world import World, alive, jobs, recipe_of
from test_sweep import STEPS, STUDENTS, SWEEP, TUNE, job_of

from overproof.artifacts import Artifact
from overproof.cluster.placement import Capacity, NodeShape, resource_requests, why_unplaceable
from overproof.data.parquet_reader import Shards
from overproof.distill.distributed_student import DistributedStudentTrainer
from overproof.distill.student_trainer import StudentTrainer
from overproof.distill.tune_search import trial_slots
from overproof.errors import InputError
from overproof.models.hf_directory import load_model, to_tensors
from overproof.train.loop import validation_ids, validation_loss

GROUP = {**SWEEP, "students": STUDENTS[:2], "group": {"workers": 2, "zero_stage": 2}}
SAME = 1e-3  # relative: sums over two ranks round otherwise


def validation_losses_alone(world: World, cached: Artifact) -> dict[int, float]:
    """Of the first student, trained by one process without Ray, by step."""
    student = StudentTrainer(job_of(world.context("sweep", cached=cached, sweep=SWEEP, tune=TUNE), "wide"))
    losses = dict[int, float]()
    while max(losses, default=0) < STEPS:
        segment = student.run_to_validation()
        losses[segment.steps] = segment.validation_loss
    return losses


def curve(folder: Path, name: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "curves" / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.trial
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.usefixtures("ray_cluster")
def test_a_group_trains_what_one_process_trains(workers: int, digits_world: World, digits_cache: Artifact) -> None:
    """As a trial of a sweep runs it; the sweep of groups, with a kill, is among the trials."""
    grouped = {**GROUP, "students": STUDENTS[:1], "group": {"workers": workers, "zero_stage": 2}}
    (job,) = jobs(digits_world.context("sweep", cached=digits_cache, sweep=grouped))
    trainer = DistributedStudentTrainer()
    trainer.start(job)
    results = [trainer.run_to_validation()]
    while results[-1]["steps"] < STEPS:
        results.append(trainer.run_to_validation())
    rows = [row for result in results for row in result["curve"]]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, STEPS + 1))
    expected = validation_losses_alone(digits_world, digits_cache)
    assert {result["steps"]: result["validation_loss"] for result in results} == {
        step: pytest.approx(expected[step], rel=SAME) for step in (7, 14, 21, STEPS)
    }
    assert results[-1]["cpu_seconds"] > 0
    model = load_model(Path(job.draft.uri) / job.folder)
    shards = Shards(digits_world.root, "validation")
    batch = to_tensors(shards.take(validation_ids(shards.rows, 64)))
    assert validation_loss(model, digits_world.predict, [batch]) == pytest.approx(
        results[-1]["validation_loss"], rel=SAME
    )
    for _ in range(100):  # nothing of a group outlives its trial
        if not alive("RayTrainWorker", "TrainController"):
            return
        time.sleep(0.1)
    raise AssertionError("workers outlive their trial")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sweep": {**GROUP, "batch_size": 15}}, "batch_size 15 is not a multiple of group.workers 2"),
        ({"sweep": {**GROUP, "group": {"workers": 0}}}, "sweep.group.workers: found 0"),
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
    nodes = Capacity((NodeShape("up", 4, 0, 1, always=1), NodeShape("up", 3, 1, 1, always=1)), "")
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
