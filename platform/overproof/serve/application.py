"""The Ray Serve application that listens: the gateway, which starts the controller and with it every model.

`serve run` and `serve deploy` build it from YAML with ``import_path: overproof.serve.application:build``.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from overproof import console
from overproof.addresses import is_loopback
from overproof.config import Serve
from overproof.errors import InputError
from overproof.files import absolute_uri
from overproof.registry import TASKS
from overproof.serve.controller import describe_version
from overproof.serve.controller_handle import HEAD_NODE
from overproof.serve.environment import KEY_FILE_VARIABLE, KEY_VARIABLE, KEYS_VARIABLE, is_key_inherited
from overproof.serve.gateway import Gateway
from overproof.serve.middleware import Access, load_access
from overproof.serve.package_trust import read_trusted_keys, tell_unsigned
from overproof.serve.ray_serve import Application, make_application
from overproof.serve.request_source import ANY_ORIGIN
from overproof.serve.traffic import prepare_traffic
from overproof.tasks.base import ArrayTask

LOG = logging.getLogger("ray.serve")
GATEWAY_NAME = "overproof"
HEALTH_PERIOD_S = 1.0  # so that a gateway that ended is soon replaced
DRAIN_TIMEOUT_S = 310
SURGE_PERCENT = 100  # an update starts the new gateway before it stops the old one


def build(args: dict[str, Any]) -> Application:
    """The application of ``{"package": PATHS or URIs, ...}`` and fields of the recipe's ``serve`` section.

    A relative path starts where Ray was started. Packages are verified here and again by every replica.

    Raises:
        InputError: an unknown or missing argument, or a package that may not be served.
    """
    fields = dict(args)
    given = fields.pop("package", None)
    packages = [given] if isinstance(given, str) else given
    if not isinstance(packages, list) or not all(isinstance(package, str) for package in packages):
        raise InputError(f"args.package: found {given!r}; expected a package's folder or URI, or a list of such")
    settings = Serve.parse(fields, "args")
    if is_key_inherited():
        LOG.warning("%s is in the environment of every process of this cluster; %s or %s names a file instead",
                    KEY_VARIABLE, KEY_FILE_VARIABLE, KEYS_VARIABLE)  # fmt: skip
    settings_by_package = dict.fromkeys(packages, settings)
    return gateway_application(settings_by_package, resolve_settings(settings_by_package, settings), load_access())


def resolve_settings(packages: Mapping[str, Serve], settings: Serve) -> Serve:
    """Settings whose files have absolute names, and of which those that are written to exist.

    Raises:
        InputError: a package may not be served, or traffic cannot be kept.
    """
    update: dict[str, Any] = {
        name: absolute_uri(file) for name in ("tls_certificate", "tls_key") if (file := getattr(settings, name))
    }
    settings = read_trusted_keys(settings)
    versions = [describe_version(at, each, settings, console.out.print) for at, each in packages.items()]
    for version in versions:
        tell_unsigned(version)
    tasks = {version.model.overproof.task for version in versions}
    if settings.traffic is not None:
        if tasks and all(isinstance(TASKS[task], ArrayTask) for task in tasks):
            raise InputError(
                f"serve.traffic: found only {', '.join(sorted(tasks))}; traffic is kept of models that write"
            )
        update["traffic"] = prepare_traffic(settings.traffic)
    update["deployments"] = absolute_uri(
        settings.deployments or str(Path(tempfile.mkdtemp(prefix="overproof-")) / "deployments.json")
    )
    return settings.model_copy(update=update)


def absolute_packages(packages: Mapping[str, Serve]) -> dict[str, Serve]:
    """The settings by absolute location of each package, which is valid on every node."""
    return {absolute_uri(location): each for location, each in packages.items()}


def gateway_application(packages: Mapping[str, Serve], settings: Serve, access: Access) -> Application:
    """The gateways, ready to run; they have the controller start these packages and what the deployments file names.

    Raises:
        InputError: a host that others reach has no API key.
    """
    require_keys(settings, access)
    labels = settings.gateway_node_labels
    return make_application(
        Gateway,
        "gateway",
        absolute_packages(packages),
        settings,
        access,
        num_replicas=settings.gateways,
        ray_actor_options={"num_cpus": 0, **({"label_selector": labels} if labels else {"resources": HEAD_NODE})},
        max_surge_percent=SURGE_PERCENT,
        health_check_period_s=HEALTH_PERIOD_S,
        graceful_shutdown_timeout_s=DRAIN_TIMEOUT_S + settings.drain_notice_s,
    )


def require_keys(settings: Serve, access: Access) -> None:
    """Refuse to listen where other machines reach it, or to let every web page ask, unless requests need a key.

    Raises:
        InputError: a host that others reach has no API key, or any origin may ask.
    """
    if not is_loopback(settings.host) and not access.needs_key:
        raise InputError(
            f"serve.host: {settings.host} can be reached from other machines; set {KEY_VARIABLE} to a secret "
            f"that requests must carry, {KEY_FILE_VARIABLE} to a file with one, or {KEYS_VARIABLE} to a file of keys "
            "(`overproof keys add NAME`), or take 127.0.0.1"
        )
    if ANY_ORIGIN in settings.origins and not access.needs_key:
        raise InputError(
            f"serve.origins: found '*' without an API key: every web page could ask; name the origins, or set "
            f"{KEY_VARIABLE}"
        )
