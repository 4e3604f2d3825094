"""Open and close the house from Python: what `overproof serve`, `overproof deploy` and the demo call."""

from __future__ import annotations

import contextlib
import logging
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.context import _get_global_client

from overproof.config import SERVER_FIELDS, Serve
from overproof.errors import InputError
from overproof.files import absolute_uri
from overproof.serve.application import NAME, absolute_packages, gateway_application, require_keys, resolve_settings
from overproof.serve.controller import get_or_create_controller, unwrap_remote_errors
from overproof.serve.deployments import CONTROLLER, application_name
from overproof.serve.middleware import api_key, load_access
from overproof.serve.net import free_port
from overproof.serve.ray_serve import replica_counts, start_application, wait_until_running

__all__ = [
    "api_key",
    "base_url",
    "call_controller",
    "count_replicas",
    "is_serving",
    "start_gateway",
    "start_serving",
    "stop_serving",
    "tls_trust",
]

LOG = logging.getLogger("ray.serve")
STOP_TIMEOUT_S = 30


def start_serving(package: Path | str, settings: Serve) -> str:
    """Serve a package on the connected cluster, from its head node, and return the base URL once it answers.

    A house that is open already takes it in. Replicas on other machines read the package themselves: give a shared
    folder or a URI then.

    Raises:
        InputError: the package may not be served, a host that others reach has no API key, the port is taken, or
            the house that is open has another address.
    """
    LOG.setLevel(logging.WARNING)
    if is_serving():
        base = base_url(settings)
        call_controller("deploy", absolute_uri(str(package)), settings, "stable", "overproof")
        return base
    return start_gateway({str(package): settings}, settings)


def start_gateway(packages: Mapping[str, Serve], settings: Serve) -> str:
    """Start the gateway and the desk with these packages, and what the book has; gives the base URL.

    Raises:
        InputError: as ``start``.
    """
    require_keys(settings, load_access())
    tls_trust(settings)
    settings = settings.model_copy(update={"port": free_port(settings.host, settings.port)})
    settings = resolve_settings(packages, settings)
    app = gateway_application(packages, settings, load_access())
    LOG.setLevel(logging.WARNING)
    serve.start(proxy_location="Disabled")
    try:
        opening = get_or_create_controller(settings).open.remote(settings, absolute_packages(packages))
        start_application(app, NAME)  # meanwhile; it then asks for the same, and finds it done
        with unwrap_remote_errors():
            ray.get(opening)
        wait_until_running(NAME)
    except BaseException:
        stop_serving()
        raise
    return _base(settings)


def is_serving() -> bool:
    """Whether a house is open on the connected cluster."""
    return NAME in serve.status().applications


def call_controller(what: str, *args: Any) -> Any:
    """Ask the desk of the house that is open.

    Raises:
        InputError: none is, or the desk refuses.
    """
    if not is_serving():
        raise InputError("nothing is served on this cluster; `overproof serve` or `overproof deploy` begins")
    desk = ray.get_actor(CONTROLLER, namespace=CONTROLLER)
    try:
        with unwrap_remote_errors():
            return ray.get(getattr(desk, what).remote(*args))
    except RayActorError:
        raise InputError(f"the desk ended before it had done {what!r}, and is being replaced; ask again") from None


def tls_trust(settings: Serve) -> ssl.SSLContext | bool:
    """What a client verifies: the server's own certificate, whatever host it names; True where there is none.

    Raises:
        InputError: the certificate or its key cannot be read.
    """
    if settings.tls_certificate is None or settings.tls_key is None:
        return True
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(settings.tls_certificate, settings.tls_key)
        context = ssl.create_default_context(cafile=settings.tls_certificate)
    except OSError as error:  # an ssl.SSLError is one
        files = f"{settings.tls_certificate}, {settings.tls_key}"
        raise InputError(f"serve.tls_certificate, serve.tls_key: {files}: {error}; expected a pair in PEM") from None
    context.check_hostname = False
    return context


def stop_serving() -> None:
    """Close the house: end the gateway and every replica, Ray Serve where nobody else uses it, and the desk."""
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is not None:
        LOG.setLevel(logging.WARNING)
        _stop_applications(client)
    with contextlib.suppress(ValueError):  # there is no desk
        ray.kill(ray.get_actor(CONTROLLER, namespace=CONTROLLER))


def _stop_applications(client: Any) -> None:
    ours = sorted((name for name in serve.status().applications if name.startswith(NAME)), key=len)  # the house first
    if len(ours) < len(serve.status().applications):
        for name in ours:
            serve.delete(name)
        return
    # As serve.shutdown() does, but without retries: those have Ray print a warning at every stop.
    with contextlib.suppress(RayActorError):  # the controller answers by ending
        ray.get(client._controller.graceful_shutdown.options(max_task_retries=0).remote(), timeout=STOP_TIMEOUT_S)
    serve.shutdown()  # type: ignore[no-untyped-call]


def base_url(settings: Serve | None = None) -> str:
    """Base URL of the house that is open, which serves all models with the same port, certificate, budget and so on.

    Raises:
        InputError: none is open, or these settings ask for another.
    """
    opened: Serve = call_controller("settings")
    for name in SERVER_FIELDS:
        found = getattr(opened, name)
        if settings is not None and name in settings.model_fields_set and getattr(settings, name) not in (found, 0):
            asked = getattr(settings, name)
            raise InputError(f"serve.{name}: found {asked!r}, and the house that is open has {found!r}; leave it out")
    return _base(opened)


def count_replicas(package: str) -> int:
    """Those of a package that answer."""
    return replica_counts().get(application_name(package), 0)


def _base(settings: Serve) -> str:
    return f"{'https' if settings.tls_certificate else 'http'}://{_reachable(settings.host)}:{settings.port}"


def _reachable(host: str) -> str:
    if host in ("0.0.0.0", "::"):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host
