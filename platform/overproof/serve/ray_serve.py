"""Applications of Ray Serve: started, resized, counted, stopped, and why one does not run.

The one file of the package with private parts of Ray Serve, each behind a function that says why it is needed.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve import Application as Application
from ray.serve._private import replica as serve_replica
from ray.serve._private.common import DeploymentID, ReplicaState
from ray.serve.context import _get_global_client, _set_global_client
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview
from ray.util import get_node_ip_address

from overproof.errors import InputError

MODEL_DEPLOYMENT = "model"  # the one deployment of an application that holds a package
START_TIMEOUT_S, STATUS_POLL_S = 900, 0.1  # a node may have to be rented first, and a large model loads for minutes
STOP_TIMEOUT_S = 30
REPLICA_ACTOR = "SERVE_REPLICA::"  # before the application's name, in that of a replica's actor
_configuring = threading.Lock()  # Ray Serve's configurations register modules with cloudpickle, and forget them again


def start_serve() -> None:
    """Start Ray Serve where it does not run; its own HTTP proxies are not used."""
    serve.start(proxy_location="Disabled")


def node_ip_address() -> str:
    """Address at which the cluster's other nodes reach this one."""
    address: str = get_node_ip_address()  # type: ignore[no-untyped-call]
    return address


def find_actor(name: str) -> Any:
    """Handle of the actor that has this name in a namespace of the same name.

    Raises:
        ValueError: there is none.
    """
    return ray.get_actor(name, namespace=name)


def make_application(deployed: type, name: str, *arguments: Any, **options: Any) -> Application:
    """An application of one deployment: a class, what it is made from, and Ray Serve's options."""
    with _configuring:
        deployment: Any = serve.deployment(deployed, name=name, **options)
        application: Application = deployment.bind(*arguments)
    return application


def start_application(application: Application, name: str) -> None:
    """Start or update an application whose number of replicas ``set_replicas`` decides; return at once."""
    target = serve.RunTarget(application, name, route_prefix=None, external_scaler_enabled=True)
    with _configuring:
        serve.run_many([target], wait_for_applications_running=False)


def wait_until_running(name: str, replicas: int = 1, patience_s: float | None = None) -> None:
    """Wait until an application runs, with so many replicas; where there is a ``patience_s``, after it with fewer.

    Raises:
        RuntimeError: it does not; the message says why.
    """
    start_s = time.monotonic()
    while True:
        found = serve.status().applications.get(name)
        if found is None or found.status == ApplicationStatus.DELETING:
            raise RuntimeError("it was stopped while it was being started")
        if found.status == ApplicationStatus.DEPLOY_FAILED:
            raise RuntimeError(failure_reason(found))
        running = sum(each.replica_states.get(ReplicaState.RUNNING, 0) for each in found.deployments.values())
        if found.status == ApplicationStatus.RUNNING and running >= replicas:
            return
        waited_s = time.monotonic() - start_s
        if running and patience_s is not None and waited_s > patience_s:
            return
        if waited_s > START_TIMEOUT_S:
            raise RuntimeError(
                f"{running} of {replicas} replicas in {START_TIMEOUT_S} s; is there a node for each? "
                f"{failure_reason(found)}"
            )
        time.sleep(STATUS_POLL_S)


def delete_application(name: str, wait: bool = True) -> None:
    """Stop an application once its replicas have finished what they have begun."""
    serve.delete(name, _blocking=wait)


def abandon_application(name: str) -> None:
    """Stop an application that answers nobody yet, or no longer.

    Serve would wait for minutes for one that no node takes; the names of its actors are private.
    """
    serve.delete(name, _blocking=False)
    deadline_s = time.monotonic() + STOP_TIMEOUT_S
    while name in running_applications() and time.monotonic() < deadline_s:
        for actor in ray.util.list_named_actors(all_namespaces=True):
            if actor["name"].startswith(f"{REPLICA_ACTOR}{name}#"):
                with contextlib.suppress(ValueError):  # it has ended
                    ray.kill(ray.get_actor(**actor))
        time.sleep(STATUS_POLL_S)  # Serve may be about to start another one


def abandon_starting(prefix: str) -> None:
    """Stop the applications whose names have a prefix and of which not every replica has been started yet."""
    for name, application in serve.status().applications.items():
        if name.startswith(prefix) and application.status == ApplicationStatus.DEPLOYING:
            abandon_application(name)


def running_applications() -> list[str]:
    """Names of all applications, whatever their state; none where Ray Serve does not run."""
    return list(serve.status().applications)


def failure_reason(application: ApplicationStatusOverview) -> str:
    """Why an application does not run: what was wrong with the input, else the last line that Ray Serve reports."""
    messages = [application.message, *(deployment.message for deployment in application.deployments.values())]
    lines = [line.strip() for each in messages for line in each.splitlines() if line.strip()]
    input_errors = [
        line.partition(f"{InputError.__name__}: ")[2] for line in lines if f"{InputError.__name__}: " in line
    ]
    return (input_errors or lines or ["Ray Serve does not say why"])[-1]


def listen_on_loopback() -> None:
    """Have the replica of this process open its own gRPC port to this machine alone: it is for handles that use gRPC,
    which nobody here does, and takes pickled requests. Called while the replica's class is made, before it listens.

    Private: Ray Serve binds it to every address, and has no setting for that.
    """
    module: Any = serve_replica
    add_port = module.add_port_to_grpc_server
    module.add_port_to_grpc_server = lambda server, _: add_port(server, "127.0.0.1:0")


def set_replicas(name: str, count: int) -> None:
    """Have an application of a package keep so many replicas.

    Private, for Serve's public ways to do so are its own autoscaler, which does not see the gateway's queue, and a
    dashboard request, which a cluster without a dashboard does not take.
    """
    client = _get_global_client()
    assert client is not None
    ray.get(client._controller.update_deployment_replicas.remote(DeploymentID(MODEL_DEPLOYMENT, name), count))


def replica_counts(prefix: str) -> dict[str, int]:
    """Applications of packages whose names have a prefix, and how many replicas of each run.

    ``ReplicaState`` is private, for the public status has it as a key and under no other name.
    """
    return {
        name: application.deployments[MODEL_DEPLOYMENT].replica_states.get(ReplicaState.RUNNING, 0)
        if MODEL_DEPLOYMENT in application.deployments  # which comes after its application, and goes before it
        else 0
        for name, application in serve.status().applications.items()
        if name.startswith(prefix)
    }


def is_serve_running() -> bool:
    """Whether Ray Serve runs on the connected cluster.

    Private, for every public question starts it, or raises in a process that has never asked before.
    """
    return _get_global_client(raise_if_no_controller_running=False) is not None


def forget_serve_client() -> None:
    """Have this process find Ray Serve anew at its next call.

    Private: an actor that outlives Ray Serve holds a client whose controller is gone, and nothing public drops it.
    """
    _set_global_client(None)  # type: ignore[no-untyped-call]


def shutdown_serve() -> None:
    """Stop Ray Serve and all its applications, as ``serve.shutdown()`` does.

    Private, to ask the controller without retries: it answers by ending, and a retry has Ray print a warning each time.
    """
    client: Any = _get_global_client()
    with contextlib.suppress(RayActorError):  # the answer of a controller that has ended
        ray.get(client._controller.graceful_shutdown.options(max_task_retries=0).remote(), timeout=STOP_TIMEOUT_S)
    serve.shutdown()  # type: ignore[no-untyped-call]
