"""The Ray Serve application: replicas that each verify and load one package.

`serve run` and `serve deploy` build it from YAML with ``import_path: overproof.serve.app:build``.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application

from overproof.errors import InputError
from overproof.recipe import Serve
from overproof.registry.package import Package, locate, open_package
from overproof.serve.engines.base import ClassifierEngine, TextEngine
from overproof.serve.engines.llamacpp import LlamaCpp
from overproof.serve.engines.onnx import OnnxClassifier
from overproof.serve.http import Served, build_http
from overproof.serve.limits import Access, access

ONGOING_PER_SLOT = 4  # requests a replica holds: one decodes in each slot, the others wait in the engine
QUEUED_PER_SLOT = 16  # requests that wait outside before more are refused with 503
UPSCALE_DELAY_S, DOWNSCALE_DELAY_S = 5, 60
HEALTH_PERIOD_S, HEALTH_TIMEOUT_S = 10, 30
IN_HTTP_OPTIONS = ("host", "port")


def build(args: dict[str, Any]) -> Application:
    """The application of ``{"package": PATH or URI, ...}``, with fields of the recipe's ``serve`` section beside it.

    A relative path starts where Ray was started. The package is verified here and again by every replica.

    Raises:
        InputError: an unknown or missing argument, or a package that may not be served.
    """
    settings = dict(args)
    package = settings.pop("package", None)
    if not isinstance(package, str):
        raise InputError(f"args.package: found {package!r}; expected a package's folder or URI")
    for name in IN_HTTP_OPTIONS:
        if name in settings:
            raise InputError(f"args.{name}: belongs to http_options; move it there")
    return application(package, Serve.parse(settings, "args"), access())


def application(where: str, settings: Serve, access: Access) -> Application:
    """Replicas of a package, ready to run.

    Raises:
        InputError: the package may not be served.
    """
    open_package(locate(where))
    place = where if "://" in where else str(Path(where).expanduser().absolute())
    ongoing = ONGOING_PER_SLOT * settings.slots
    deployment = Replica.options(  # type: ignore[attr-defined]
        autoscaling_config={
            "min_replicas": settings.min_replicas,
            "max_replicas": settings.max_replicas,
            "target_ongoing_requests": settings.slots,
            "upscale_delay_s": UPSCALE_DELAY_S,
            "downscale_delay_s": DOWNSCALE_DELAY_S,
        },
        max_ongoing_requests=ongoing,
        max_queued_requests=QUEUED_PER_SLOT * settings.slots,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        ray_actor_options={"num_cpus": settings.cpus_per_replica},
    )
    return deployment.bind(place, settings, access, ongoing)  # type: ignore[no-any-return]


@serve.deployment(name="model")
@serve.ingress()
class Replica:
    """One package behind HTTP."""

    def __init__(self, where: str, settings: Serve, access: Access, calls: int) -> None:
        package = open_package(locate(where))
        self._engine = load_engine(package, settings)
        self._served = Served(package, self._engine, settings.max_tokens, calls)
        self._access = access

    def __serve_build_asgi_app__(self) -> FastAPI:
        """What Ray Serve calls for the HTTP application."""
        return build_http(self._served, self._access)

    async def check_health(self) -> None:
        """What Ray Serve calls now and then; an error has the replica replaced."""
        await asyncio.to_thread(self._engine.check)


def load_engine(package: Package, settings: Serve) -> TextEngine | ClassifierEngine:
    """The engine for the package's kind, with its model loaded."""
    if package.content.kind == "text":
        return LlamaCpp(package.model, settings.threads, settings.slots, reuse_prefix=True)
    return OnnxClassifier(package.model, settings.threads)
