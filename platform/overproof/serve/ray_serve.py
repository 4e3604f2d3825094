"""Applications of Ray Serve: begun, waited for, counted, and why one does not run."""

from __future__ import annotations

import time

import ray
from ray import serve
from ray.serve import Application
from ray.serve._private.common import DeploymentID, ReplicaState
from ray.serve.context import _get_global_client
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview

from overproof.errors import InputError
from overproof.serve.deployments import application_name

START_S, STATUS_S = 900, 0.1  # a node may have to be rented first, and a large model loads for minutes


def start_application(application: Application, name: str) -> None:
    """Have Ray Serve start or update an application, of which its own proxies know nothing, and we say how large."""
    target = serve.RunTarget(application, name, route_prefix=None, external_scaler_enabled=True)
    serve.run_many([target], wait_for_applications_running=False)


def set_replicas(name: str, count: int) -> None:
    """Have an application of a package keep so many replicas."""
    client = _get_global_client()
    assert client is not None
    ray.get(client._controller.update_deployment_replicas.remote(DeploymentID("model", name), count))


def wait_until_running(name: str) -> None:
    """Wait until an application answers.

    Raises:
        RuntimeError: it does not.
    """
    deadline = time.monotonic() + START_S
    while True:
        found = serve.status().applications[name]
        if found.status == ApplicationStatus.RUNNING:
            return
        if found.status == ApplicationStatus.DEPLOY_FAILED:
            raise RuntimeError(failure_reason(found))
        if time.monotonic() > deadline:
            raise RuntimeError(f"no replica in {START_S} s; is there a node for it? {failure_reason(found)}")
        time.sleep(STATUS_S)


def replica_counts() -> dict[str, int]:
    """Those of Ray Serve that hold a package, and how many replicas of each answer."""
    return {
        name: application.deployments["model"].replica_states.get(ReplicaState.RUNNING, 0)
        if "model" in application.deployments  # which comes after its application, and goes before it
        else 0
        for name, application in serve.status().applications.items()
        if name.startswith(application_name(""))
    }


def failure_reason(application: ApplicationStatusOverview) -> str:
    """Why an application does not run: what was wrong with the input, or else the last that Ray Serve says."""
    said = [application.message, *(deployment.message for deployment in application.deployments.values())]
    lines = [line.strip() for each in said for line in each.splitlines() if line.strip()]
    wrong = [line.partition(f"{InputError.__name__}: ")[2] for line in lines if f"{InputError.__name__}: " in line]
    return (wrong or lines or ["Ray Serve does not say why"])[-1]
