"""The Ray Serve application in front of all models: the gateway, which brings the desk that says who answers.

`serve run` and `serve deploy` build it from YAML with ``import_path: overproof.serve.application:build``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application

from overproof.config import Serve
from overproof.errors import InputError
from overproof.files import absolute_uri
from overproof.serve.controller import ON_HEAD, describe_version
from overproof.serve.gateway import Gateway
from overproof.serve.middleware import KEY_VARIABLE, KEYS_VARIABLE, Access, is_loopback, load_access
from overproof.serve.traffic import prepare_traffic

NAME = "overproof"
HEALTH_PERIOD_S = 1.0  # a gateway that ended is soon replaced
DRAIN_S = 310
SURGE_PERCENT = 100


def build(args: dict[str, Any]) -> Application:
    """The application of ``{"package": PATHS or URIs, ...}``, with fields of the recipe's ``serve`` section beside it.

    A relative path starts where Ray was started. Packages are verified here and again by every replica.

    Raises:
        InputError: an unknown or missing argument, or a package that may not be served.
    """
    settings = dict(args)
    given = settings.pop("package", None)
    packages = [given] if isinstance(given, str) else given
    if not isinstance(packages, list) or not all(isinstance(package, str) for package in packages):
        raise InputError(f"args.package: found {given!r}; expected a package's folder or URI, or a list of such")
    parsed = Serve.parse(settings, "args")
    models = dict.fromkeys(packages, parsed)
    return gateway_application(models, resolve_settings(models, parsed), load_access())


def resolve_settings(packages: Mapping[str, Serve], settings: Serve) -> Serve:
    """Settings whose files are named wherever a process starts, and are there.

    Raises:
        InputError: a package may not be served, or traffic cannot be kept.
    """
    update: dict[str, Any] = {
        name: absolute_uri(file) for name in ("tls_certificate", "tls_key") if (file := getattr(settings, name))
    }
    kinds = {describe_version(where, each).model.overproof.kind for where, each in packages.items()}
    if settings.traffic is not None:
        if kinds and "text" not in kinds:
            raise InputError(f"serve.traffic: found {', '.join(kinds)} packages alone; traffic is kept of text")
        update["traffic"] = prepare_traffic(settings.traffic)
    update["deployments"] = absolute_uri(
        settings.deployments or str(Path(tempfile.mkdtemp(prefix="overproof-")) / "deployments.json")
    )
    return settings.model_copy(update=update)


def absolute_packages(packages: Mapping[str, Serve]) -> dict[str, Serve]:
    """Packages named wherever a process starts."""
    return {absolute_uri(where): each for where, each in packages.items()}


def gateway_application(packages: Mapping[str, Serve], settings: Serve, access: Access) -> Application:
    """The gateway, ready to run; its desk then starts these packages and what is in the book.

    Raises:
        InputError: a host that others reach has no API key.
    """
    require_keys(settings, access)
    gateway: Any = serve.deployment(
        Gateway,
        name="gateway",
        ray_actor_options={"num_cpus": 0, "resources": ON_HEAD},
        max_surge_percent=SURGE_PERCENT,
        health_check_period_s=HEALTH_PERIOD_S,
        graceful_shutdown_timeout_s=DRAIN_S,
    )
    bound: Application = gateway.bind(absolute_packages(packages), settings, access)
    return bound


def require_keys(settings: Serve, access: Access) -> None:
    """Let nobody in from other machines without a key.

    Raises:
        InputError: a host that others reach has no API key.
    """
    if not is_loopback(settings.host) and not access.keyed:
        raise InputError(
            f"serve.host: {settings.host} can be reached from other machines; set {KEY_VARIABLE} to a secret that "
            f"requests must carry, or {KEYS_VARIABLE} to a file of keys (`overproof keys add NAME`), or take 127.0.0.1"
        )
