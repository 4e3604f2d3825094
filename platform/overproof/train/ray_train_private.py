"""The parts of Ray Train's private API that are used, in one place, as any release of Ray may move them.

Ray Train V2 has no public way to say when a run starts again, on how many workers, or whether a node is being drained
(without a round trip to an actor at each step). tests/train/test_ray_train_private.py holds every name to what it is
used for.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psutil
import ray
from ray.data._internal.stats import get_or_create_stats_actor
from ray.exceptions import GetTimeoutError, RayActorError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError, WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2._internal.execution.controller.state import ReschedulingState, RunningState, TrainControllerState
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision, ScalingDecision
from ray.train.v2._internal.execution.worker_group import WorkerGroupPollStatus, WorkerGroupState
from ray.train.v2._internal.execution.worker_group.poll import _is_preempted_actor as is_preempted_actor
from ray.train.v2.api.config import FailureConfig, ScalingConfig
from ray.train.v2.api.exceptions import ControllerError, PreemptionError, TrainingFailedError, WorkerGroupError

from overproof.cluster.ray_private import remove_placement_groups
from overproof.models.compute import start_compute

__all__ = [
    "ABORT_TIMEOUT_S",
    "WORKER_CLASS",
    "ControllerError",
    "DrainWatch",
    "ElasticScalingPolicy",
    "FailureConfig",
    "FailureDecision",
    "FailurePolicy",
    "NoopDecision",
    "PolicyTrainer",
    "PreemptionError",
    "QuietTorchConfig",
    "ReschedulingState",
    "RunningState",
    "ScalingConfig",
    "ScalingDecision",
    "TrainControllerState",
    "TrainingFailedError",
    "WorkerGroupError",
    "WorkerGroupPollStatus",
    "WorkerGroupStartupTimeoutError",
    "WorkerGroupState",
    "WorkerHealthCheckFailedError",
    "is_preempted_actor",
    "remove_own_placement_groups",
]

ABORT_TIMEOUT_S = 3
WORKER_CLASS = "RayTrainWorker"  # the actor class of a training worker


class DrainWatch:
    """Whether the node of this training worker is being drained: a look at memory, no call."""

    def __init__(self) -> None:
        self._context = get_train_context().preemption_context

    @property
    def draining(self) -> bool:
        """Ranks may differ for a moment."""
        return self._context.preemption_info is not None


def remove_own_placement_groups() -> None:
    """Called in a controller without workers: give back what Ray reserved for groups that did not start."""
    controller = ray.get_runtime_context().get_actor_id()
    assert controller is not None
    remove_placement_groups(controller)


def use_own_interface() -> None:
    """Have Gloo, in this process, speak from the address by which Ray knows its node.

    By itself it takes what the host's name resolves to, which on many hosts is 127.0.0.1 or 127.0.1.1: ranks on other
    hosts then look for this one on their own.
    """
    address = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    names = (name for name, found in psutil.net_if_addrs().items() if any(each.address == address for each in found))
    if (name := next(names, None)) is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


class QuietTorchBackend(_TorchBackend):
    """Ray's torch backend, whose ranks find each other whatever their hosts' names resolve to, and whose shutdown would
    wait 30 s for ranks that wait for a dead one: the processes are killed next, whatever they answer.
    """

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(use_own_interface)
        if backend_config.backend == "nccl":
            worker_group.execute(start_compute, 1, "fp32")  # an error that says more than NCCL's
        super().on_start(worker_group, backend_config)

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        del worker_group, backend_config


class QuietTorchConfig(TorchConfig):
    """A torch process group that ends with its processes."""

    @property
    def backend_cls(self) -> type[QuietTorchBackend]:
        return QuietTorchBackend


class PolicyTrainer(TorchTrainer):
    """Ray's trainer with policies of one's own for failures and scaling, and without two of its actors.

    The placement-group cleaner looks for the controller in the newest Ray cluster of the machine and kills the run when
    it is not there, which is so wherever a second cluster was started meanwhile; the policies and Ctrl-C remove groups
    instead. The dataset manager serves datasets that a driver hands over: here rank 0 opens its own.
    """

    def __init__(
        self, work: Callable[[], Any], failure_policy: FailurePolicy, scaling_policy: ElasticScalingPolicy, **given: Any
    ) -> None:
        """Each worker does ``work``; ``given`` is what a ``TorchTrainer`` takes."""
        self.failure_policy, self.scaling_policy = failure_policy, scaling_policy
        super().__init__(work, **given)

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()  # type: ignore[misc]
        unused = (PlacementGroupCleanerCallback, DatasetsCallback)
        return [each for each in callbacks if not isinstance(each, unused)]

    def _initialize_and_run_controller(self, **given: Any) -> Any:
        policies = {"failure_policy": self.failure_policy, "scaling_policy": self.scaling_policy}
        return super()._initialize_and_run_controller(**given | policies)  # type: ignore[misc]

    def _register_sigint_handler(self, controller: Any) -> None:
        """End on Ctrl-C, and at once on the second.

        Ray's handler waits for the controller, which does not answer while it waits for nodes.
        """

        def kill(*_: Any) -> None:
            ray.kill(controller)
            with suppress(RayActorError, GetTimeoutError):  # until it is dead it may reserve another group
                ray.get(controller.__ray_ready__.remote(), timeout=ABORT_TIMEOUT_S)
            remove_placement_groups(controller._actor_id.hex())
            raise KeyboardInterrupt

        def stop(*_: Any) -> None:
            signal.signal(signal.SIGINT, kill)
            with suppress(RayActorError, GetTimeoutError):
                ray.get(controller.abort.remote(), timeout=ABORT_TIMEOUT_S)
            kill()

        signal.signal(signal.SIGINT, stop)


def start_data_stats_actor() -> None:
    """Start the actor of Ray Data that outlives every job on the node of this process.

    Private, for Ray Data has it where a cluster first reads data, and of a training that is a worker: no autoscaler
    could take that node away again.
    """
    get_or_create_stats_actor()
