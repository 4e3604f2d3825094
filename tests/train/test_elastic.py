"""Nodes that are killed, join and are drained under a training; workers and drivers that are killed: on real nodes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from cluster_runs import COMMON, RUNS
from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.train.v2.api.preemption import PreemptionInfo
from tiny_data import settings

from overproof.errors import InputError
from overproof.stage_context import ProgressEvent, TrainingResumed
from overproof.train.checkpoint import Checkpoints
from overproof.train.ray_elastic import PlannedRestart, RetryPolicy, largest_world
from overproof.train.ray_train_private import (
    ControllerError,
    FailureDecision,
    PreemptionError,
    WorkerGroupError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)

TOLERANCE = 1e-5


def _python(script: str, *arguments: str) -> None:
    path = Path(__file__).with_name(script)
    done = subprocess.run(
        [sys.executable, str(path), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "RAY_TRAIN_V2_ENABLED": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("elastic")
    _python("cluster_runs.py", str(folder))
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same trainings, never interrupted, on two workers, without Ray."""
    folder = tmp_path_factory.mktemp("whole")
    cases = [
        {"name": name, "data": "text", "attempts": [{"world": 2}], "train": {**COMMON, **run}}
        for name, run in RUNS.items()
    ]
    _python("resume_ranks.py", str(folder), json.dumps(cases))
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


def values(result: dict[str, Any], key: str) -> list[tuple[int, float]]:
    return [(row["step"], row[key]) for row in result["rows"] if key in row]


@pytest.mark.parametrize("key", ["loss", "grad_norm", "learning_rate", "validation_loss"])
def test_kills_of_a_worker_the_controller_and_the_driver_leave_no_trace(
    ran: dict[str, Any], whole: dict[str, Any], key: str
) -> None:
    """Rows are those of the plan, or a worker refuses; equal to the last bit, none was lost or came twice."""
    found, expected = (values(each["killed"], key) for each in (ran, whole))
    assert [(step, value.hex()) for step, value in found] == [(step, value.hex()) for step, value in expected]
    assert found


def test_a_kill_costs_no_more_than_the_steps_since_the_last_checkpoint(ran: dict[str, Any]) -> None:
    for before, after in ran["killed"]["steps"].values():
        assert after == before // 10 * 10 + 1
    assert any("a worker died" in event["text"] and event["step"] == 10 for event in ran["killed"]["resumed"])


def test_a_run_whose_controller_is_killed_ends_and_says_what_to_do(ran: dict[str, Any]) -> None:
    assert ran["killed"]["ended_with_the_controller"] != 0
    assert "run again: training goes on from step 20" in ran["killed"]["errors"]


def test_workers_go_with_their_driver_on_a_cluster_that_stays(ran: dict[str, Any]) -> None:
    assert ran["killed"]["workers_of_dead_driver_gone"]


def test_a_killed_node_leaves_fewer_workers(ran: dict[str, Any]) -> None:
    before, after = ran["moved"]["steps"]["node"]
    assert after == before // 10 * 10 + 1


def test_a_node_that_joins_is_used_from_a_checkpoint_made_for_it(ran: dict[str, Any]) -> None:
    last, first = ran["moved"]["steps"]["join"]
    assert first == last + 1


def test_a_drained_node_is_left_at_the_next_step(ran: dict[str, Any]) -> None:
    last, first = ran["moved"]["steps"]["drain"]
    assert first == last + 1
    assert ran["moved"]["drained_is_left"]
    resumed = ran["moved"]["resumed"][-1]
    assert resumed["step"] == last
    assert f"checkpoint of step {last} committed" in resumed["text"]


def test_other_numbers_of_workers_train_the_same(ran: dict[str, Any], whole: dict[str, Any]) -> None:
    for key in ("loss", "validation_loss"):
        found, expected = (values(each["moved"], key) for each in (ran, whole))
        assert [step for step, _ in found] == [step for step, _ in expected]
        assert max(abs(a - b) for (_, a), (_, b) in zip(found, expected, strict=True)) < TOLERANCE


DIED = WorkerHealthCheckFailedError("health", failure=ActorDiedError())
MOVES = [
    WorkerGroupError("", {0: PlannedRestart("there is room for more workers"), 1: PlannedRestart("")}),
    PreemptionError(PreemptionInfo(None, {"node": [1]})),
    ControllerError(WorkerGroupStartupTimeoutError(3)),
]


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    found = Checkpoints(str(tmp_path / "train.work"), "f" * 64, {}, {}, settings().checkpoint)
    found.claim_folder()
    return found


def test_failures_count_until_a_checkpoint_is_committed(checkpoints: Checkpoints) -> None:
    events: list[ProgressEvent] = []
    policy = RetryPolicy(checkpoints, 3, events.append)
    failure = WorkerGroupError("", {0: RuntimeError("Connection closed by peer"), 1: DIED})
    decisions = [policy.make_decision(failure) for _ in range(2)]
    checkpoints.record_step(10)
    decisions += [policy.make_decision(failure) for _ in range(3)]
    assert decisions == [FailureDecision.RETRY] * 4 + [FailureDecision.RAISE]
    resumed = [event for event in events if isinstance(event, TrainingResumed)]
    assert [event.step for event in resumed] == [0, 0, 10, 10]
    assert resumed[2].text.startswith("a worker died: ")
    assert "(failure 1 of 3 without a new checkpoint)" in resumed[2].text


def test_moves_are_no_failures(checkpoints: Checkpoints) -> None:
    policy = RetryPolicy(checkpoints, 1, [].append)
    assert [policy.make_decision(move) for move in MOVES] == [FailureDecision.RETRY] * 3


@pytest.mark.parametrize("hopeless", [InputError("step 3: loss is nan"), OutOfMemoryError("the node ran low")])
def test_what_cannot_get_better_ends_the_run(checkpoints: Checkpoints, hopeless: Exception) -> None:
    policy = RetryPolicy(checkpoints, 8, [].append)
    wrapped = WorkerHealthCheckFailedError("health", failure=hopeless)
    for failure in (hopeless, wrapped):
        decision = policy.make_decision(WorkerGroupError("", {0: RuntimeError("gloo"), 1: failure}))
        assert decision == FailureDecision.RAISE


@pytest.mark.parametrize(
    ("worlds", "nodes", "limit", "expected"),
    [
        ((1, 2, 3), [4, 4, 4], 3, 3),
        ((1, 2, 3), [4, 4, 4], 2, 2),  # after three found no room
        ((1, 2, 4), [4, 4, 4], 4, 2),  # 3 does not divide the batch
        ((1, 2), [3, 3], 2, 1),  # a reader needs a CPU
        ((2, 4), [4, 2], 4, None),
        ((1, 2), [2, 2, 2], 2, None),  # a worker does not fit on parts of nodes
    ],
)
def test_the_largest_number_of_workers_that_fits(
    worlds: Sequence[int], nodes: list[int], limit: int, expected: int | None
) -> None:
    assert largest_world(worlds, [{"CPU": float(cpus)} for cpus in nodes], {"CPU": 3, "GPU": 0}, limit) == expected
