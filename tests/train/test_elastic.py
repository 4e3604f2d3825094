"""When a training starts again, and with how many workers.

``tests/trials/training`` moves and kills nodes, workers, controllers and drivers under one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
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
