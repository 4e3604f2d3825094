"""Nodes that join and are drained under a training, and when a training starts again.

``tests/trials/training`` kills nodes, workers, controllers and drivers, too.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import engine_ranks
import pytest
import ray
from ray.core.generated.autoscaler_pb2 import DrainNodeReason
from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.train.v2.api.preemption import PreemptionInfo
from tiny_data import LLAMA, settings

from finished import RECIPES
from overproof.artifacts import Store
from overproof.cli.fault_injection import PausedProgress, ProgressLog, StepLimit, extra_node
from overproof.cluster.progress_relay import relay_progress
from overproof.config import load_recipe
from overproof.data.manifest import Manifest
from overproof.data.order import rows_hash
from overproof.errors import InputError
from overproof.models.hf_directory import build_model
from overproof.stage_context import ProgressEvent, StageContext, StepTrained, TaskProgress, TrainingResumed, no_progress
from overproof.train.checkpoint import Checkpoints
from overproof.train.engine import TorchEngine
from overproof.train.metrics import ROWS_HASH
from overproof.train.ray_elastic import PlannedRestart, RetryPolicy, largest_world
from overproof.train.ray_train_private import (
    ControllerError,
    FailureDecision,
    PreemptionError,
    WorkerGroupError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)
from overproof.train.ray_trainer import train_teacher

TOLERANCE = 1e-5
SEED = engine_ranks.SEED
PLAN = settings(
    model=LLAMA, batch_size=12, steps=100, validate_every=25, workers=(1, 3), zero_stage=3,
    cpus_per_worker=3,  # one worker a node
    checkpoint={"every_steps": 50},
)  # fmt: skip


@dataclass
class Moved:
    """A training whose nodes came and went."""

    rows: list[dict[str, float]]
    events: list[ProgressEvent]
    grown_from: int  # the step after which there were three workers
    shrunk_from: int  # and the one after which there were two again


def drain(address: str, node_id: str) -> None:
    """What a cloud does to a spot node before it takes it."""
    reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline_ms = int((time.time() + 600) * 1000)
    accepted, why = ray._raylet.GcsClient(address=address).drain_node(node_id, reason, "", deadline_ms)
    assert accepted, why


def node_ids() -> set[str]:
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    return {node["NodeID"] for node in nodes if node["Alive"]}


@pytest.fixture(scope="module")
def moved(ray_cluster: str, text_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Moved:
    """Begun on two nodes, one worker on each; a third node joins and is drained again."""
    store = Store(str(tmp_path_factory.mktemp("store")))
    draft = store.new_writer("text", "prepare", "a" * 64, {}, {})
    shutil.copytree(text_root, draft.uri, dirs_exist_ok=True)
    prepared, own = draft.commit({}, 0.0), store.new_writer("moved", "train", "b" * 64, {}, {})
    log, limit = ProgressLog(no_progress), StepLimit(Path(store.uri) / "limit")
    recipe = load_recipe(RECIPES / "digits.yaml").model_copy(update={"train": PLAN, "seed": SEED})
    resumed: list[int] = []

    def pace(first: int, workers: int) -> int:
        """A step a second until so many workers have made one; gives that step."""
        began_s = time.monotonic()
        for step in range(first, PLAN.steps):
            limit.set(step)
            if reached := log.wait_step(began_s, workers=workers, timeout_s=1.0):
                resumed.append(log.resumed_step(began_s, reached[0]))
                return reached[1].done
        raise AssertionError(f"no step by {workers} workers: {log.events[-5:]}")

    def move() -> None:
        try:
            limit.set(3)
            assert log.wait_step(at_least=3, workers=2)
            before = node_ids()
            with extra_node(ray_cluster, cpus=4):
                step = pace(4, workers=3)
                (node_id,) = node_ids() - before
                drain(ray_cluster, node_id)
                pace(step + 1, workers=2)
        finally:
            limit.set()

    limit.set(3)
    with relay_progress(log) as progress, ThreadPoolExecutor(1) as pool:
        script = pool.submit(move)
        paused = PausedProgress(progress, limit)
        try:
            train_teacher(StageContext(recipe, {"prepare": prepared}, own, paused))
        finally:
            log.finish()
        script.result()
    rows = [json.loads(line) for line in (Path(own.uri) / "curve.jsonl").read_text().splitlines()]
    return Moved(rows, [event for _, event in log.events], *resumed)


@pytest.mark.trial
def test_a_node_that_joins_and_one_that_is_drained_cost_no_step(moved: Moved) -> None:
    """Each time the workers leave with a checkpoint of the step they have just made."""
    reached = 0
    resumed = []
    for event in moved.events:
        if isinstance(event, StepTrained):
            assert event.done >= reached  # none is made again
            reached = event.done
        elif isinstance(event, TrainingResumed):
            assert event.step >= reached
            resumed.append(event)
    assert [event.step for event in resumed if event.step] == [moved.grown_from, moved.shrunk_from]
    assert "there is room for more workers" in resumed[0].text
    assert "a node is being drained" in resumed[-1].text


@pytest.mark.trial
def test_other_numbers_of_workers_train_the_same(moved: Moved, text_root: Path) -> None:
    """As plain torch in one process, on the rows that were planned; every step is there once."""
    plan = PLAN.model_copy(update={"workers": 1})
    manifest = Manifest.read(text_root)
    engine = TorchEngine(build_model(LLAMA, manifest, SEED), plan)
    expected = engine_ranks.train(engine, plan, text_root, 0, 1)
    for key in ("loss", "validation_loss"):
        found, whole = ([(row["step"], row[key]) for row in rows if key in row] for rows in (moved.rows, expected))
        assert [step for step, _ in found] == [step for step, _ in whole]
        assert max(abs(a - b) for (_, a), (_, b) in zip(found, whole, strict=True)) < TOLERANCE
    planned = rows_hash(manifest.order(SEED).rows_at(0, plan.steps * plan.batch_size))
    assert sum(row[ROWS_HASH] for row in moved.rows if ROWS_HASH in row) == planned


@pytest.mark.trial
def test_progress_says_how_far_it_is_and_with_how_many_workers(moved: Moved) -> None:
    assert moved.events[0] == TaskProgress("train", 0, PLAN.steps, "starting 1 to 3 workers")
    last = [event for event in moved.events if isinstance(event, StepTrained)][-1]
    assert (last.task, last.done, last.total, last.workers) == ("train", PLAN.steps, PLAN.steps, 2)
    assert last.loss == [row["loss"] for row in moved.rows if "loss" in row][-1]
    assert last.note.startswith(f"loss {last.loss:.2f} · ")


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
