"""Every private part of Ray Train that is used, held to what it is used for: a release that moves one fails here."""

from __future__ import annotations

import inspect
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import ray.train.v2.api.data_parallel_trainer as data_parallel_trainer
from ray.exceptions import ActorDiedError
from ray.train.torch import TorchTrainer
from ray.train.v2.api.preemption import PreemptionInfo
from tiny_data import settings

from overproof.artifacts import Store
from overproof.stage_context import no_progress
from overproof.train import ray_train_private as private
from overproof.train.checkpoint import Checkpoints
from overproof.train.ray_elastic import ElasticScaling, RetryPolicy, root_causes
from overproof.train.ray_trainer import make_trainer, train_rank
from overproof.train.train_job import SupervisedSpec, TrainJob


@pytest.fixture
def trainer(tmp_path: Path) -> private.PolicyTrainer:
    draft = Store(str(tmp_path)).new_writer("tiny", "train", "b" * 64, {}, {})
    plan = settings()
    checkpoints = Checkpoints(draft.workspace, draft.fingerprint, {}, {}, plan.checkpoint)
    job = TrainJob(plan, 0, draft.commit({}, 0.0), draft, checkpoints, no_progress, SupervisedSpec(plan.model))
    return make_trainer(job, train_rank, str(tmp_path))


def overridden(cls: type) -> list[str]:
    return [name for name, value in vars(cls).items() if inspect.isfunction(value) and name != "__init__"]


@pytest.mark.parametrize(
    ("cls", "base"),
    [
        (private.PolicyTrainer, TorchTrainer),
        (private.QuietTorchConfig, private.TorchConfig),
        (private.QuietTorchBackend, private._TorchBackend),
        (RetryPolicy, private.FailurePolicy),
    ],
)
def test_what_is_overridden_is_there(cls: type, base: type) -> None:
    for name in overridden(cls):
        own, theirs = (inspect.signature(getattr(each, name)) for each in (cls, base))
        positional = [p.name for p in theirs.parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD]
        assert [p.name for p in own.parameters.values()][: len(positional)] == positional or "given" in str(own), name


@pytest.mark.parametrize(("address", "given", "expected"), [
    ("127.0.0.1", None, "lo"), ("127.0.0.1", "eth7", "eth7"), ("198.51.100.9", None, None),
])  # fmt: skip
def test_gloo_speaks_from_the_address_of_the_node(
    monkeypatch: pytest.MonkeyPatch, address: str, given: str | None, expected: str | None
) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    if given is not None:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", given)
    else:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "x")  # for what is set here to be taken back
        monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: address)
    private.use_own_interface()
    assert os.environ.get("GLOO_SOCKET_IFNAME") == expected


def test_the_trainer_calls_what_is_overridden() -> None:
    source = inspect.getsource(data_parallel_trainer)
    for name in ("_create_default_callbacks", "_initialize_and_run_controller", "_register_sigint_handler"):
        assert f"self.{name}(" in source


def test_two_of_rays_actors_are_not_started(ray_cluster: str, trainer: private.PolicyTrainer) -> None:
    used = {type(each) for each in trainer._create_default_callbacks()}
    unused = {type(each) for each in TorchTrainer._create_default_callbacks(trainer)} - used
    assert unused == {private.PlacementGroupCleanerCallback, private.DatasetsCallback}


def test_the_policies_reach_the_controller(trainer: private.PolicyTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(TorchTrainer, "_initialize_and_run_controller", lambda _, **arguments: given.update(arguments))
    trainer._initialize_and_run_controller(failure_policy="theirs", scaling_policy="theirs", callbacks=[])
    assert isinstance(given["failure_policy"], RetryPolicy)
    assert isinstance(given["scaling_policy"], ElasticScaling)
    parameters = inspect.signature(private.TorchTrainer._initialize_and_run_controller).parameters
    assert given["callbacks"] == []
    assert any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values()) or {
        "failure_policy", "scaling_policy",
    } <= set(parameters)  # fmt: skip


def test_ctrl_c_is_answered_by_the_trainer(trainer: private.PolicyTrainer) -> None:
    before = signal.getsignal(signal.SIGINT)
    try:
        trainer._register_sigint_handler(controller=None)
        assert signal.getsignal(signal.SIGINT) is not before
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_process_group_ends_with_its_processes(trainer: private.PolicyTrainer) -> None:
    assert trainer.backend_config.backend_cls is private.QuietTorchBackend
    private.QuietTorchBackend().on_shutdown(None, None)  # and waits for nobody


def test_scaling_reads_what_its_base_has(trainer: private.PolicyTrainer) -> None:
    policy = trainer.scaling_policy
    assert policy.worker_resources == {"CPU": 1.0, "GPU": 0.0} or policy.worker_resources == {"CPU": 1.0}  # type: ignore[attr-defined]
    for name in ("_maybe_send_resource_request", "_get_resize_decision", "on_controller_start_worker_group"):
        assert callable(getattr(private.ElasticScalingPolicy, name))


def test_errors_carry_what_is_read_from_them() -> None:
    died = private.WorkerHealthCheckFailedError("health", failure=ActorDiedError())
    preempted = private.PreemptionError(PreemptionInfo(None, {"node": [1]}))
    no_room = private.WorkerGroupStartupTimeoutError(3)
    assert no_room.num_workers == 3
    assert [type(each) for each in root_causes(private.WorkerGroupError("", {0: died}))] == [ActorDiedError]
    assert root_causes(private.ControllerError(no_room)) == [no_room]
    assert root_causes(preempted) == [preempted]
    assert not private.is_preempted_actor(ActorDiedError())


def test_states_carry_what_is_read_from_them() -> None:
    error = private.ControllerError(private.WorkerGroupStartupTimeoutError(3))
    state = private.ReschedulingState(training_failed_error=error)
    assert state.training_failed_error.controller_failure.num_workers == 3
    assert issubclass(private.RunningState, private.TrainControllerState)
    fields = {field for cls in (private.WorkerGroupState,) for field in inspect.signature(cls).parameters}
    assert {"start_time", "workers"} <= fields
    assert isinstance(inspect.getattr_static(private.WorkerGroupState, "num_workers"), property)
