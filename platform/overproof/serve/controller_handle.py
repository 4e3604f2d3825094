"""How other processes reach the controller: its handle, started where there is need, and results of its calls."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from overproof.config import Serve
from overproof.errors import InputError
from overproof.serve import ray_serve
from overproof.serve.controller import Controller
from overproof.serve.deployments import CONTROLLER_NAME

HEAD_NODE = {"node:__internal_head__": 0.001}  # Ray's resource of the head node, whose address clients know


def get_or_create_controller(settings: Serve) -> Any:
    """Handle of the cluster's controller, started where there is none."""
    return (
        ray.remote(Controller)
        .options(
            name=CONTROLLER_NAME,
            namespace=CONTROLLER_NAME,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            resources=HEAD_NODE,
            max_restarts=-1,
            max_concurrency=1000,
        )
        .remote(settings)
    )


def get_controller() -> Any:
    """Handle of the cluster's controller.

    Raises:
        InputError: there is none.
    """
    try:
        return ray_serve.find_actor(CONTROLLER_NAME)
    except ValueError:
        raise InputError("the controller is not there; it is being started, or serving is being stopped") from None


def wait_for_controller(result: Any) -> Any:
    """The result of a call to the controller.

    Raises:
        InputError: it refuses, or it ended before it was done.
    """
    try:
        with unwrap_remote_errors():
            return ray.get(result)
    except RayActorError:
        raise InputError("the controller ended before the change was done, and is being replaced; try again") from None


def kill_controller() -> None:
    """End the controller, where there is one."""
    with contextlib.suppress(InputError):
        ray.kill(get_controller())


@contextlib.contextmanager
def unwrap_remote_errors() -> Iterator[None]:
    """Raise an actor's own error in place of the one that Ray wraps it in."""
    try:
        yield
    except RayTaskError as error:
        raise error.cause from None
