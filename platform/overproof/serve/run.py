"""Start and stop serving from Python: what `overproof serve` and the demo call."""

from __future__ import annotations

import contextlib
import logging
import ssl
import time
from pathlib import Path

import httpx
import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import HTTPOptions
from ray.serve.context import _get_global_client

from overproof.errors import InputError
from overproof.files import from_anywhere
from overproof.recipe import Serve
from overproof.registry.package import locate, open_package
from overproof.serve.app import application
from overproof.serve.limits import KEY_VARIABLE, KEYS_VARIABLE, access, api_key, is_loopback
from overproof.serve.port import free_port

__all__ = ["api_key", "start", "stop", "trusted"]

LOG = logging.getLogger("ray.serve")
REQUEST_TIMEOUT_S = 300
READY_TIMEOUT_S = 60
STOP_TIMEOUT_S = 30
POLL_S = 0.1


def start(package: Path | str, settings: Serve) -> str:
    """Serve a package on the connected cluster, from its head node, and return the base URL once it answers.

    Replicas on other machines read the package themselves: give a shared folder or a URI then.

    Raises:
        InputError: the package may not be served, a host that others reach has no API key, the port is taken, or
            the cluster already serves something else.
    """
    allowed = access()
    if not is_loopback(settings.host) and not allowed.keyed:
        raise InputError(
            f"serve.host: {settings.host} can be reached from other machines; set {KEY_VARIABLE} to a secret that "
            f"requests must carry, or {KEYS_VARIABLE} to a file of keys (`overproof keys add NAME`), or take 127.0.0.1"
        )
    verify = trusted(settings)
    name = open_package(locate(str(package))).content.name
    app = application(str(package), settings, allowed)
    LOG.setLevel(logging.WARNING)
    host, port = _listen(settings, name)
    try:
        serve.run(app, name=name, route_prefix="/")
        base = f"{'http' if verify is True else 'https'}://{_reachable(host)}:{port}"
        _wait(base, verify)
    except BaseException:
        stop()
        raise
    return base


def trusted(settings: Serve) -> ssl.SSLContext | bool:
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


def stop() -> None:
    """End every replica, and Ray Serve with them; the cluster stays."""
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return
    LOG.setLevel(logging.WARNING)
    # As serve.shutdown() does, but without retries: those have Ray print a warning at every stop.
    with contextlib.suppress(RayActorError):  # the controller answers by ending
        ray.get(client._controller.graceful_shutdown.options(max_task_retries=0).remote(), timeout=STOP_TIMEOUT_S)
    serve.shutdown()  # type: ignore[no-untyped-call]


def _listen(settings: Serve, name: str) -> tuple[str, int]:
    """Where Serve listens: as it already does on this cluster, else as the settings say."""
    running = _running()
    if running is None:
        port = free_port(settings.host, settings.port)
        options = {"host": settings.host, "port": port, "request_timeout_s": REQUEST_TIMEOUT_S}
        if settings.tls_certificate and settings.tls_key:
            files = {"ssl_certfile": settings.tls_certificate, "ssl_keyfile": settings.tls_key}
            options |= {name: from_anywhere(file) for name, file in files.items()}
        serve.start(proxy_location="HeadOnly", http_options=options)
        return settings.host, port
    others = sorted(set(serve.status().applications) - {name})
    if others:
        raise InputError(f"this cluster already serves {', '.join(others)}; stop it first, or use another cluster")
    found = (str(running.host), running.port)
    if found != (settings.host, settings.port or running.port):
        raise InputError(
            f"Ray Serve listens at {found[0]}:{found[1]} on this cluster; expected {settings.host}:{settings.port}. "
            "Ask for that address, or stop Serve first: `serve shutdown`"
        )
    return found


def _running() -> HTTPOptions | None:
    client = _get_global_client(raise_if_no_controller_running=False)
    return None if client is None else client.http_config


def _reachable(host: str) -> str:
    if host in ("0.0.0.0", "::"):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


def _wait(base: str, verify: ssl.SSLContext | bool) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while True:
        try:
            reply = httpx.get(f"{base}/healthz", trust_env=False, verify=verify)
            if reply.status_code == httpx.codes.OK:
                return
            found = f"status {reply.status_code}"
        except httpx.TransportError as error:
            found = repr(error)
        if time.monotonic() > deadline:
            raise RuntimeError(f"{base}/healthz did not answer in {READY_TIMEOUT_S} s: {found}")
        time.sleep(POLL_S)
