"""What keeps a run going when its nodes do not: when to start again, with how many workers, and on whose word.

A node that is drained and a node that joins are met alike. Every rank is asked for a checkpoint at its next step, and
once that is committed all of them leave by an exception, so that Ray starts them again where they may run, from there.
No step is done twice.
"""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ray
from ray._private.state import available_resources_per_node, state
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError, WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2._internal.execution.controller.state import ReschedulingState, RunningState, TrainControllerState
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision, ScalingDecision
from ray.train.v2._internal.execution.worker_group import WorkerGroupPollStatus, WorkerGroupState
from ray.train.v2._internal.execution.worker_group.poll import _is_preempted_actor
from ray.train.v2.api.config import FailureConfig, ScalingConfig
from ray.train.v2.api.exceptions import ControllerError, PreemptionError, TrainingFailedError, WorkerGroupError

from overproof.cluster.placement import Resources, count_fitting
from overproof.errors import InputError
from overproof.stage_context import NOTICE
from overproof.train.checkpoint import Checkpoints, Notify
from overproof.train.train_job import TrainJob

GROW_CHECK_S = 10.0  # between looks for room, and after a start
NODE_ID = "ray.io/node-id"  # a label that every node has
READER_CPUS = 1.0  # that no worker may take, or nobody would read the rows
ANSWER_TIMEOUT_S = 1.0
LONGEST_CAUSE = 300  # characters of an error that are shown
Node = Mapping[str, Any]  # as ray.nodes() describes one

_asked = threading.Event()  # in a worker's process: there is room for a larger group


def notify(job: TrainJob, line: str) -> None:
    """Tell the user what happened to a run, beside how far it is."""
    job.progress(NOTICE, job.checkpoints.committed(), job.train.steps, line)


class PlannedRestart(Exception):
    """All ranks leave: the checkpoint they were asked for is committed, and they start again from it elsewhere."""


class WorkerCheckpointSignal:
    """How a rank learns that it is asked for a checkpoint: a node is drained, or there is room for more workers."""

    def __init__(self) -> None:
        self._drain = get_train_context().preemption_context

    def rung(self) -> bool:
        """Whether this rank was asked. Cheap; ranks may differ for a moment.

        ``ray.train.get_preemption_info`` says the same on all ranks, for a round trip to an actor at each step.
        """
        return _asked.is_set() or self._drain.preemption_info is not None

    def answered(self, step: int) -> None:
        """Leave, all ranks together, after the checkpoint of ``step`` is committed.

        Raises:
            Leaving: always.
        """
        drained, room = self._drain.preemption_info is not None, _asked.is_set()
        why = "a node is being drained" if drained else "there is room for more workers" if room else "the nodes change"
        raise PlannedRestart(f"{why}; checkpoint of step {step} committed")


def request_checkpoint() -> None:
    """Ask this process's rank for a checkpoint; Ray Train's controller runs it in every worker."""
    _asked.set()


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


class RetryPolicy(FailurePolicy):
    """Start again from the newest checkpoint, unless that cannot help, or did not ``max_failures`` times in a row."""

    def __init__(self, checkpoints: Checkpoints, max_failures: int, say: Notify) -> None:
        super().__init__(FailureConfig())
        self.checkpoints, self.max_failures, self.say = checkpoints, max_failures, say
        self.failures, self.committed = 0, 0

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        found = root_causes(training_failed_error)
        if any(isinstance(cause, InputError | OutOfMemoryError) for cause in found):
            return FailureDecision.RAISE
        committed = self.checkpoints.committed()
        if moved := _moved(found):
            self.say(f"{moved}; going on from step {committed}")
            return FailureDecision.RETRY
        if committed > self.committed:
            self.failures, self.committed = 0, committed
        self.failures += 1
        if self.failures >= self.max_failures:
            return FailureDecision.RAISE
        count = f"failure {self.failures} of {self.max_failures} without a new checkpoint"
        self.say(f"{describe_error(found)}; going on from step {committed} ({count})")
        return FailureDecision.RETRY


def _moved(found: Iterable[BaseException]) -> str | None:
    """What happened, where nothing failed: nodes came, go or are awaited. One lost node fails every rank."""
    for cause in found:
        match cause:
            case PlannedRestart():
                return str(cause)
            case PreemptionError():
                return "a node was taken away"
            case WorkerGroupStartupTimeoutError():
                return f"no room for {cause.num_workers} workers yet"
            case Exception() if _is_preempted_actor(cause):
                return "a node was taken away"
    return None


def describe_error(found: Sequence[BaseException]) -> str:
    """The first error in a line: the one of a dead worker, if one died."""
    dead = [cause for cause in found if isinstance(cause, RayActorError)]
    cause = dead[0] if dead else found[0]
    text = " ".join(str(cause).split())
    if dead:
        why = (text.partition("is dead because ")[2] or text).partition(" Some common causes")[0]
        return f"a worker died: {why[:LONGEST_CAUSE]}"
    return f"{type(cause).__name__}: {text[:LONGEST_CAUSE]}"


def largest_world(worlds: Sequence[int], nodes: Sequence[Resources], each: Resources, limit: int) -> int | None:
    """The largest of ``worlds``, up to ``limit``, that finds room and leaves CPUs to the readers."""
    cpus = sum(node.get("CPU", 0) for node in nodes)
    room = min(count_fitting(nodes, each), limit)
    return max((w for w in worlds if w <= room and w * each.get("CPU", 0) + READER_CPUS <= cpus), default=None)


class ElasticScaling(ElasticScalingPolicy):
    """As many workers as there is room for, out of the numbers that divide the batch.

    Ray's own policy counts on a view of the nodes that is up to 20 s old, knows nothing of drained nodes, and resizes
    without a checkpoint.
    """

    def __init__(self, scaling_config: ScalingConfig, worlds: Sequence[int], check_s: float = GROW_CHECK_S) -> None:
        super().__init__(scaling_config)
        self.worlds, self.check_s = tuple(worlds), check_s
        self.limit, self.looked_s, self.rung = worlds[-1], 0.0, False
        self.only: tuple[str, ...] = ()

    @property
    def each(self) -> Resources:
        """What a worker asks for."""
        asked: Resources = self.scaling_config._resources_per_worker_not_none
        return asked

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """Start on what answers. Where too little does, ask for the fewest: Ray waits for room."""
        self._maybe_send_resource_request()  # type: ignore[no-untyped-call]
        listed = _living()
        nodes = {name: node for name, node in listed.items() if _answers(node)}
        self.only = tuple(nodes) if len(nodes) < len(listed) else ()
        world = largest_world(self.worlds, [node["Resources"] for node in nodes.values()], self.each, self.limit)
        return self._get_resize_decision(world or self.worlds[0])

    def on_controller_start_worker_group(self, **_: Any) -> dict[str, str] | None:
        """Keep workers off nodes that do not answer: Ray itself takes some 15 s to notice that one is dead."""
        return {NODE_ID: f"in({','.join(self.only)})"} if self.only else None

    def make_decision_for_running_worker_group(
        self, worker_group_state: WorkerGroupState, worker_group_status: WorkerGroupPollStatus
    ) -> ScalingDecision:
        """Never resize a running group: ring, and it leaves with a checkpoint."""
        del worker_group_status
        self._maybe_send_resource_request()  # type: ignore[no-untyped-call]
        now = time.monotonic()
        if not self.rung and now - max(self.looked_s, worker_group_state.start_time) >= self.check_s:
            self.looked_s = now
            if self._room(worker_group_state) > worker_group_state.num_workers:
                self.rung = True
                for worker in worker_group_state.workers:
                    worker.execute_async(request_checkpoint)
        return NoopDecision()

    def _room(self, group: WorkerGroupState) -> int:
        """How many workers there could be, with the CPUs that others use left to them."""
        free: dict[str, Resources] = available_resources_per_node()  # type: ignore[no-untyped-call]
        nodes = {node: Counter(free.get(node, {})) for node in _living()}
        for worker in group.workers:
            if worker.metadata.node_id in nodes:
                nodes[worker.metadata.node_id].update(self.each)
        return largest_world(self.worlds, list(nodes.values()), self.each, self.worlds[-1]) or 0

    def after_controller_state_update(
        self, previous_state: TrainControllerState, current_state: TrainControllerState
    ) -> None:
        """Ask for fewer after a group found no room, whatever the nodes promise; for all again once one runs."""
        match current_state:
            case RunningState():
                self.limit = self.worlds[-1]
                self.rung = self.rung and isinstance(previous_state, RunningState)
            case ReschedulingState(training_failed_error=ControllerError(controller_failure=error)):
                if isinstance(error, WorkerGroupStartupTimeoutError):
                    self.limit = max(self.worlds[0], error.num_workers - 1)


def _living() -> dict[str, Node]:
    """The nodes that Ray takes for alive and that are not drained, by id."""
    drained = state.get_draining_nodes()
    listed: list[Node] = ray.nodes()  # type: ignore[no-untyped-call]
    return {node["NodeID"]: node for node in listed if node["Alive"] and node["NodeID"] not in drained}


def _answers(node: Node) -> bool:
    """Whether a node's Ray daemon takes a connection."""
    try:
        with socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), ANSWER_TIMEOUT_S):
            return True
    except OSError:
        return False
