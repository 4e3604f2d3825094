"""What keeps a run going when its nodes do not: when it starts again, and with how many workers.

A node that is drained and a node that joins are handled alike. Every rank is asked for a checkpoint at its next step,
and once that is committed all of them leave by an exception, so that Ray starts them again where they may run, from
there. No step is done twice.
"""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError

from overproof.cluster import ray_private
from overproof.cluster.placement import Resources, count_fitting
from overproof.errors import InputError
from overproof.stage_context import Progress, TrainingResumed
from overproof.train.checkpoint import Checkpoints
from overproof.train.ray_train_private import (
    ControllerError,
    DrainWatch,
    ElasticScalingPolicy,
    FailureConfig,
    FailureDecision,
    FailurePolicy,
    NoopDecision,
    PreemptionError,
    ReschedulingState,
    RunningState,
    ScalingConfig,
    ScalingDecision,
    TrainControllerState,
    TrainingFailedError,
    WorkerGroupError,
    WorkerGroupPollStatus,
    WorkerGroupStartupTimeoutError,
    WorkerGroupState,
    WorkerHealthCheckFailedError,
    is_preempted_actor,
    remove_own_placement_groups,
)
from overproof.units import format_count

GROW_CHECK_S = 10.0  # between looks for room, and after a start
NODE_ID_LABEL = "ray.io/node-id"  # every node has it
READER_CPUS = 1.0  # that no worker may take, or nobody would read the rows
CONNECT_TIMEOUT_S = 1.0
LONGEST_CAUSE = 300  # characters of an error that are shown
Node = Mapping[str, Any]  # as ray.nodes() describes one

_grow_requested = threading.Event()  # in a worker's process: there is room for a larger group


class PlannedRestart(Exception):
    """All ranks leave: the checkpoint they were asked for is committed, and they start again from it elsewhere."""


class WorkerCheckpointSignal:
    """How a rank learns that a checkpoint is wanted: a node is drained, or there is room for more workers."""

    def __init__(self) -> None:
        self._drain = DrainWatch()

    def requested(self) -> bool:
        """Whether this rank was asked. Cheap; ranks may differ for a moment."""
        return _grow_requested.is_set() or self._drain.draining

    def acknowledge(self, step: int) -> None:
        """Leave, all ranks together, after the checkpoint of ``step`` is committed.

        Raises:
            PlannedRestart: always.
        """
        if self._drain.draining:
            cause = "a node is being drained"
        else:
            cause = "there is room for more workers" if _grow_requested.is_set() else "the nodes change"
        raise PlannedRestart(f"{cause}; checkpoint of step {step} committed")


def request_checkpoint() -> None:
    """Ask this process's rank for a checkpoint; Ray Train's controller runs it in every worker."""
    _grow_requested.set()


def root_causes(error: BaseException | None) -> list[BaseException]:
    """The errors of the workers, or of the controller, out of what Ray wrapped around them."""
    match error:
        case None:
            return []
        case RayTaskError():  # may pose as its cause, with a traceback for a message
            return root_causes(error.cause)
        case InputError() | OutOfMemoryError() | PreemptionError():
            return [error]
        case WorkerGroupError():
            return [cause for failure in error.worker_failures.values() for cause in root_causes(failure)]
        case ControllerError():
            return root_causes(error.controller_failure)
        case WorkerHealthCheckFailedError():
            return root_causes(error.health_check_failure)
    return root_causes(error.__cause__) or [error]


def describe_error(causes: Sequence[BaseException]) -> str:
    """The first error in a line: the one of a dead worker, if one died."""
    dead = [cause for cause in causes if isinstance(cause, RayActorError)]
    cause = dead[0] if dead else causes[0]
    text = " ".join(str(cause).split())
    if dead:  # for people: Ray's reason, without the sentences around it where they are as they were
        reason = (text.partition("is dead because ")[2] or text).partition(" Some common causes")[0]
        return f"a worker died: {reason[:LONGEST_CAUSE]}"
    return f"{type(cause).__name__}: {text[:LONGEST_CAUSE]}"


class RetryPolicy(FailurePolicy):
    """Start again from the newest checkpoint, unless that cannot help, or did not ``max_failures`` times in a row."""

    def __init__(self, checkpoints: Checkpoints, max_failures: int, progress: Progress) -> None:
        super().__init__(FailureConfig())
        self.checkpoints, self.max_failures, self.progress = checkpoints, max_failures, progress
        self.failures, self.last_committed = 0, 0

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        causes = root_causes(training_failed_error)
        if any(isinstance(cause, InputError | OutOfMemoryError) for cause in causes):
            return FailureDecision.RAISE
        committed = self.checkpoints.committed_step()
        if move := _describe_move(causes):
            self.progress(TrainingResumed.after(move, committed))
            return FailureDecision.RETRY
        if committed > self.last_committed:
            self.failures, self.last_committed = 0, committed
        self.failures += 1
        if self.failures >= self.max_failures:
            return FailureDecision.RAISE
        count = f"failure {self.failures} of {self.max_failures} without a new checkpoint"
        self.progress(TrainingResumed.after(f"{describe_error(causes)} ({count})", committed))
        return FailureDecision.RETRY


def _describe_move(causes: Iterable[BaseException]) -> str | None:
    """What happened, where nothing failed: nodes came, go or are awaited. One lost node fails every rank."""
    for cause in causes:
        match cause:
            case PlannedRestart():
                return str(cause)
            case PreemptionError():
                return "a node was taken away"
            case WorkerGroupStartupTimeoutError():
                return f"no room for {format_count(cause.num_workers, 'worker')} yet"
            case Exception() if is_preempted_actor(cause):
                return "a node was taken away"
    return None


class ElasticScaling(ElasticScalingPolicy):
    """As many workers as there is room for, out of the numbers that divide the batch.

    Ray's own policy counts on a view of the nodes that is up to 20 s old, knows nothing of drained nodes, and resizes
    without a checkpoint.
    """

    def __init__(self, scaling_config: ScalingConfig, worlds: Sequence[int], check_s: float = GROW_CHECK_S) -> None:
        super().__init__(scaling_config)
        self.worlds, self.check_s = tuple(worlds), check_s
        self.limit, self.checked_s, self.restart_requested = worlds[-1], 0.0, False
        self.only_nodes: tuple[str, ...] = ()  # where workers may be placed; nothing: anywhere

    @property
    def worker_resources(self) -> Resources:
        """What a worker asks for."""
        resources: Resources = self.scaling_config._resources_per_worker_not_none
        return resources

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """Start on the nodes that can be reached. Where that is too few, ask for the fewest: Ray waits for room."""
        self._maybe_send_resource_request()  # type: ignore[no-untyped-call]
        usable = _usable_nodes()
        nodes = {node_id: node for node_id, node in usable.items() if _is_reachable(node)}
        self.only_nodes = tuple(nodes) if len(nodes) < len(usable) else ()
        resources = [node["Resources"] for node in nodes.values()]
        world = largest_world(self.worlds, resources, self.worker_resources, self.limit)
        return self._get_resize_decision(world or self.worlds[0])

    def on_controller_start_worker_group(self, **_: Any) -> dict[str, str] | None:
        """Keep workers off nodes that cannot be reached: Ray itself takes some 15 s to notice that one is dead.

        Ray also forgets what it reserved for a group in which a worker died while the others started: it would stay
        reserved until the driver ends.
        """
        remove_own_placement_groups()
        return {NODE_ID_LABEL: f"in({','.join(self.only_nodes)})"} if self.only_nodes else None

    async def before_controller_shutdown(self) -> None:
        """As before each group of workers."""
        await super().before_controller_shutdown()  # type: ignore[no-untyped-call]
        remove_own_placement_groups()

    def make_decision_for_running_worker_group(
        self, worker_group_state: WorkerGroupState, worker_group_status: WorkerGroupPollStatus
    ) -> ScalingDecision:
        """Never resize a running group: ask it for a checkpoint, with which it leaves."""
        del worker_group_status
        self._maybe_send_resource_request()  # type: ignore[no-untyped-call]
        now_s = time.monotonic()
        due = now_s - max(self.checked_s, worker_group_state.start_time) >= self.check_s
        if due and not self.restart_requested:
            self.checked_s = now_s
            if self._possible_world(worker_group_state) > worker_group_state.num_workers:
                self.restart_requested = True
                for worker in worker_group_state.workers:
                    worker.execute_async(request_checkpoint)
        return NoopDecision()

    def _possible_world(self, group: WorkerGroupState) -> int:
        """How many workers there could be, with the CPUs that others use left to them."""
        free = ray_private.free_resources()
        nodes = {node_id: Counter(free.get(node_id, {})) for node_id in _usable_nodes()}
        for worker in group.workers:
            if worker.metadata.node_id in nodes:
                nodes[worker.metadata.node_id].update(self.worker_resources)
        return largest_world(self.worlds, list(nodes.values()), self.worker_resources, self.worlds[-1]) or 0

    def after_controller_state_update(
        self, previous_state: TrainControllerState, current_state: TrainControllerState
    ) -> None:
        """Ask for fewer after a group found no room, whatever the nodes promise; for all again once one runs."""
        match current_state:
            case RunningState():
                self.limit = self.worlds[-1]
                self.restart_requested = self.restart_requested and isinstance(previous_state, RunningState)
            case ReschedulingState(training_failed_error=ControllerError(controller_failure=error)):
                if isinstance(error, WorkerGroupStartupTimeoutError):
                    self.limit = max(self.worlds[0], error.num_workers - 1)


def largest_world(
    worlds: Sequence[int], nodes: Sequence[Resources], worker_resources: Resources, limit: int
) -> int | None:
    """The largest of ``worlds``, up to ``limit``, that finds room and leaves CPUs to the readers."""
    cpus, worker_cpus = sum(node.get("CPU", 0) for node in nodes), worker_resources.get("CPU", 0)
    room = min(count_fitting(nodes, worker_resources), limit)
    return max((w for w in worlds if w <= room and w * worker_cpus + READER_CPUS <= cpus), default=None)


def _usable_nodes() -> dict[str, Node]:
    """The nodes that Ray takes for alive and that are not drained, by id."""
    draining = ray_private.draining_nodes()
    nodes: list[Node] = ray.nodes()  # type: ignore[no-untyped-call]
    return {node["NodeID"]: node for node in nodes if node["Alive"] and node["NodeID"] not in draining}


def _is_reachable(node: Node) -> bool:
    """Whether a node's Ray daemon takes a connection."""
    address = (node["NodeManagerAddress"], node["NodeManagerPort"])
    try:
        with socket.create_connection(address, CONNECT_TIMEOUT_S):
            return True
    except OSError:
        return False
