"""Start and stop serving from Python: what `overproof serve`, `overproof deploy` and the demo call."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overproof.config import SERVER_FIELDS, Serve
from overproof.errors import InputError
from overproof.files import absolute_uri
from overproof.serve import ray_serve
from overproof.serve.application import (
    GATEWAY_NAME,
    absolute_packages,
    gateway_application,
    require_keys,
    resolve_settings,
)
from overproof.serve.controller import SYSTEM_USER
from overproof.serve.controller_handle import (
    get_controller,
    get_or_create_controller,
    kill_controller,
    wait_for_controller,
)
from overproof.serve.middleware import Access, load_access
from overproof.serve.net import base_url, free_port, tls_trust
from overproof.serve.package_trust import read_trusted_keys, tell_unsigned

LOG = logging.getLogger("ray.serve")


def start_serving(package: Path | str, settings: Serve) -> str:
    """Serve a package on the connected cluster, from its head node, and give the base URL once it answers.

    A server that runs already takes it in. Replicas on other machines read the package themselves: give a shared
    folder or a URI then.

    Raises:
        InputError: the package may not be served, a host that others reach has no API key, the port is taken, or
            the running server has other settings.
    """
    LOG.setLevel(logging.WARNING)
    if is_serving():
        url = running_url(settings)
        tell_unsigned(call_controller("deploy", absolute_uri(str(package)), settings, "stable", SYSTEM_USER))
        return url
    return start_gateway({str(package): settings}, settings)


@dataclass(frozen=True)
class PlannedServer:
    """A server that may start: its packages are verified, its keys, certificate and port were looked at."""

    packages: Mapping[str, Serve]
    settings: Serve  # with the port that it takes
    access: Access


def plan_server(packages: Mapping[str, Serve], settings: Serve) -> PlannedServer:
    """Look at all that starting would refuse. Needs no cluster.

    Raises:
        InputError: as ``start_serving``.
    """
    access = load_access()
    require_keys(settings, access)
    tls_trust(settings)
    settings = settings.model_copy(update={"port": free_port(settings.host, settings.port)})
    return PlannedServer(packages, resolve_settings(packages, settings), access)


def start_gateway(packages: Mapping[str, Serve], settings: Serve) -> str:
    """Start the gateway and the controller with these packages and what the deployments file names; give the base URL.

    Raises:
        InputError: as ``start_serving``.
    """
    return start_planned(plan_server(packages, settings))


def start_planned(planned: PlannedServer) -> str:
    """Start a server on the connected cluster, and give its base URL once it answers."""
    packages, settings = planned.packages, planned.settings
    application = gateway_application(packages, settings, planned.access)
    LOG.setLevel(logging.WARNING)
    ray_serve.start_serve()
    try:
        # The gateway makes the same call when it starts, and waits for this one: models load meanwhile.
        started = get_or_create_controller(settings).start.remote(settings, absolute_packages(packages))
        ray_serve.start_application(application, GATEWAY_NAME)
        wait_for_controller(started)
        ray_serve.wait_until_running(GATEWAY_NAME)
    except BaseException:
        stop_serving()
        raise
    return _base_url(settings)


def is_serving() -> bool:
    """Whether the gateway runs on the connected cluster."""
    return GATEWAY_NAME in ray_serve.running_applications()


def call_controller(method: str, *args: Any) -> Any:
    """The result of a method of the running server's controller.

    Raises:
        InputError: nothing is served, or the controller refuses.
    """
    if not is_serving():
        raise InputError("nothing is served on this cluster; `overproof deploy PACKAGE` starts a package there")
    return wait_for_controller(getattr(get_controller(), method).remote(*args))


def running_url(settings: Serve | None = None) -> str:
    """Base URL of the running server, whose models share its port, certificate, memory and so on.

    Raises:
        InputError: nothing is served, or these settings ask for another server.
    """
    running: Serve = call_controller("settings")
    if settings is not None and settings.trust.keys:
        settings = read_trusted_keys(settings)
    for name in SERVER_FIELDS:
        found = getattr(running, name)
        if settings is not None and name in settings.model_fields_set and getattr(settings, name) not in (found, 0):
            given = getattr(settings, name)
            raise InputError(f"serve.{name}: found {given!r}, and the running server has {found!r}; leave it out")
    return _base_url(running)


def _base_url(settings: Serve) -> str:
    if not settings.gateway_node_labels:
        return base_url(settings)
    return base_url(settings, min(gateway.host for gateway in call_controller("gateways", frozenset())))


def stop_serving() -> None:
    """Stop the gateway, every replica and the controller, and Ray Serve itself where nobody else uses it."""
    if ray_serve.is_serve_running():
        LOG.setLevel(logging.WARNING)
        applications = ray_serve.running_applications()
        ray_serve.abandon_starting(GATEWAY_NAME)
        own = sorted((name for name in applications if name.startswith(GATEWAY_NAME)), key=len)  # the gateway first
        if len(own) < len(applications):
            for name in own:
                ray_serve.delete_application(name)
        else:
            ray_serve.shutdown_serve()
    kill_controller()
