"""Every private part of Ray Serve that is used, on a real Ray Serve: an upgrade that changes one fails here."""

from __future__ import annotations

import asyncio
import inspect
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import psutil
import pytest
import ray
from ray import serve
from ray.serve._private import replica
from ray.serve.schema import (
    ApplicationStatus,
    ApplicationStatusOverview,
    DeploymentStatus,
    DeploymentStatusOverview,
    DeploymentStatusTrigger,
)

from overproof.errors import InputError
from overproof.serve import ray_serve, server
from shared_server import wait_until

NAME = "overproof-trial"


@serve.deployment(name=ray_serve.MODEL_DEPLOYMENT, ray_actor_options={"num_cpus": 0.1})
class Idle:
    """Answers nothing."""


@serve.deployment(name=ray_serve.MODEL_DEPLOYMENT, ray_actor_options={"num_cpus": 0.1})
class Refusing:
    def __init__(self) -> None:
        raise InputError("x: found 1; expected 2")


@pytest.fixture(scope="module")
def application(ray_cluster: str) -> Iterator[str]:
    """Ray Serve with one application of one replica."""
    server.stop_serving()  # one that another file has left
    ray_serve.start_serve()
    ray_serve.start_application(Idle.bind(), NAME)  # type: ignore[attr-defined]
    ray_serve.wait_until_running(NAME)
    yield NAME
    if ray_serve.is_serve_running():
        ray_serve.shutdown_serve()


def test_replicas_are_set_and_counted(application: str) -> None:
    assert ray_serve.replica_counts("overproof-") == {application: 1}
    assert ray_serve.replica_counts("other-") == {}
    for count in (2, 0, 1):
        ray_serve.set_replicas(application, count)
        wait_until(lambda count=count: ray_serve.replica_counts("overproof-")[application] == count)  # type: ignore[misc]


def test_a_replicas_own_port_is_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = replica
    assert 'add_port_to_grpc_server(self._server, "[::]:0")' in inspect.getsource(module)
    monkeypatch.setattr(module, "add_port_to_grpc_server", module.add_port_to_grpc_server)
    ray_serve.listen_on_loopback()

    async def listen() -> None:
        opened = grpc.aio.server()
        port = module.add_port_to_grpc_server(opened, "[::]:0")
        await opened.start()
        found = [each.laddr.ip for each in psutil.Process().net_connections("inet") if each.laddr.port == port]
        assert [ip.removeprefix("::ffff:") for ip in found] == ["127.0.0.1"]
        await opened.stop(None)

    asyncio.run(listen())


def test_a_forgotten_client_is_found_again(application: str) -> None:
    ray_serve.forget_serve_client()
    assert ray_serve.is_serve_running()
    assert ray_serve.replica_counts("overproof-") == {application: 1}


def test_the_address_of_this_node_is_one_of_the_cluster(ray_cluster: str) -> None:
    assert ray_serve.node_ip_address() in {node["NodeManagerAddress"] for node in ray.nodes()}


def test_an_application_that_fails_says_what_was_wrong_with_the_input(application: str) -> None:
    ray_serve.start_application(Refusing.bind(), "overproof-refusing")  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match=r"^x: found 1; expected 2$"):
        ray_serve.wait_until_running("overproof-refusing")
    ray_serve.delete_application("overproof-refusing")
    assert ray_serve.running_applications() == [application]


def test_replicas_that_find_no_room_are_told_of_and_fewer_are_enough_for_who_cannot_wait(
    application: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_serve, "START_TIMEOUT_S", 1.0)
    half = {"num_cpus": 0, "resources": {"node:__internal_head__": 0.6}}
    ray_serve.start_application(Idle.options(num_replicas=2, ray_actor_options=half).bind(), "overproof-half")  # type: ignore[attr-defined]
    wait_until(lambda: ray_serve.replica_counts("overproof-")["overproof-half"] == 1)
    with pytest.raises(RuntimeError, match=r"^1 of 2 replicas in 1\.0 s; is there a node for each\?"):
        ray_serve.wait_until_running("overproof-half", 2)
    ray_serve.wait_until_running("overproof-half", 2, patience_s=0.0)
    ray_serve.abandon_starting("overproof")
    assert ray_serve.running_applications() == [application]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (["", "line\nRayTaskError: overproof.errors.InputError: x: bad\nmore"], "x: bad"),
        (["Deploying", "The deployment failed to start 3 times.\n\n"], "The deployment failed to start 3 times."),
        (["", ""], "Ray Serve does not say why"),
    ],
)
def test_the_reason_is_the_input_error_or_the_last_line(messages: list[str], reason: str) -> None:
    application, deployment = messages
    deployments = {
        "model": DeploymentStatusOverview(
            DeploymentStatus.DEPLOY_FAILED, DeploymentStatusTrigger.UNSPECIFIED, {}, deployment
        )
    }
    overview = ApplicationStatusOverview(ApplicationStatus.DEPLOY_FAILED, application, 0.0, deployments)
    assert ray_serve.failure_reason(overview) == reason


def test_shutting_down_ends_ray_serve_and_it_can_be_started_again(application: str) -> None:
    """The last test of this file: it ends what the others share."""
    ray_serve.shutdown_serve()
    assert not ray_serve.is_serve_running()
    ray_serve.start_serve()
    assert ray_serve.running_applications() == []


def test_applications_are_made_in_several_threads_at_once() -> None:
    """As the controller does while it restores some and is asked for another."""
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(8) as pool:
            made = list(pool.map(lambda number: ray_serve.make_application(object, f"made-{number}"), range(200)))
    finally:
        sys.setswitchinterval(interval_s)
    assert len(made) == 200
