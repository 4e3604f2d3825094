"""The Ray Serve application: replicas that each verify and load one package.

`serve run` and `serve deploy` build it from YAML with ``import_path: overproof.serve.app:build``.
"""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from overproof.errors import InputError
from overproof.files import from_anywhere
from overproof.recipe import Serve, Traffic
from overproof.registry.package import Package, locate, open_package
from overproof.serve.beside import Beside
from overproof.serve.engines.base import ClassifierEngine, TextEngine
from overproof.serve.engines.llamacpp import LlamaCpp
from overproof.serve.engines.onnx import OnnxClassifier
from overproof.serve.http import build_http
from overproof.serve.keys import Key, Meter
from overproof.serve.limits import Access, access
from overproof.serve.metrics import Tally, gather
from overproof.serve.replies import Usage
from overproof.serve.shapes import Served
from overproof.serve.traffic import Recorder, ready

ONGOING_PER_SLOT = 4  # requests a replica holds: one decodes in each slot, the others wait in the engine
QUEUED_PER_SLOT = 16  # requests that wait outside before more are refused
REFUSED_WITH = {"status_code": 429, "retry_after_s": 1}
LOOK_BACK_S, METRICS_S = 2.0, 0.5  # of the load that replicas are added for
SURGE_PERCENT = 100  # an update starts a new replica for each before it stops an old one
HEALTH_PERIOD_S, HEALTH_TIMEOUT_S = 10, 30
IN_HTTP_OPTIONS = {"host": "host", "port": "port", "tls_certificate": "ssl_certfile", "tls_key": "ssl_keyfile"}


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
    for name, option in IN_HTTP_OPTIONS.items():
        if name in settings:
            raise InputError(f"args.{name}: belongs to http_options; move it there, as {option}")
    return application(package, Serve.parse(settings, "args"), access())


def application(where: str, settings: Serve, access: Access) -> Application:
    """Replicas of a package, ready to run.

    Raises:
        InputError: the package may not be served.
    """
    package = open_package(locate(where))
    if settings.traffic is not None:
        if package.content.kind != "text":
            raise InputError(f"serve.traffic: {where} is a {package.content.kind} package; it is kept of text alone")
        settings = settings.model_copy(update={"traffic": ready(settings.traffic)})
    ongoing = ONGOING_PER_SLOT * settings.slots
    deployment = Replica.options(  # type: ignore[attr-defined]
        autoscaling_config={
            "min_replicas": settings.min_replicas,
            "max_replicas": settings.max_replicas,
            "target_ongoing_requests": settings.slots,
            "upscale_delay_s": settings.upscale_delay_s,
            "downscale_delay_s": settings.downscale_delay_s,
            "look_back_period_s": LOOK_BACK_S,
            "metrics_interval_s": METRICS_S,
        },
        max_surge_percent=SURGE_PERCENT,
        backpressure_config=REFUSED_WITH,
        max_ongoing_requests=ongoing,
        max_queued_requests=QUEUED_PER_SLOT * settings.slots,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        ray_actor_options={"num_cpus": settings.cpus_per_replica},
    )
    meter = SharedMeter.bind() if access.keys_uri else None  # type: ignore[attr-defined]
    return deployment.bind(from_anywhere(where), settings, access, ongoing, meter)  # type: ignore[no-any-return]


@serve.deployment(name="meter", ray_actor_options={"num_cpus": 0}, max_ongoing_requests=1000)
class SharedMeter:
    """The one count of what each key has used, for all replicas."""

    def __init__(self) -> None:
        self._meter = Meter()

    async def admit(self, key: Key) -> float:
        return self._meter.admit(key)

    async def charge(self, key: Key, tokens: int) -> None:
        self._meter.charge(key, tokens)


class Shared(Beside):
    """What a replica shares with the others."""

    def __init__(self, package: str, meter: DeploymentHandle[Any] | None, traffic: Traffic | None) -> None:
        super().__init__(recorder=None if traffic is None else Recorder(traffic))
        self._shared, self._tally = meter, Tally(package)

    async def admit(self, key: Key) -> float:
        return 0.0 if self._shared is None else float(await self._shared.admit.remote(key))

    async def used(self, key: Key | None, usage: Usage) -> None:
        self._tally.used(usage.prompt_tokens, usage.completion_tokens)
        if self._shared is not None and key is not None:
            await self._shared.charge.remote(key, usage.total_tokens)

    def began(self, seconds: float) -> None:
        self._tally.began(seconds)

    async def metrics(self) -> str:
        return await gather()


@serve.deployment(name="model")
@serve.ingress()
class Replica:
    """One package behind HTTP."""

    def __init__(
        self, where: str, settings: Serve, access: Access, calls: int, meter: DeploymentHandle[Any] | None
    ) -> None:
        package = open_package(locate(where))
        self._engine = load_engine(package, settings)
        self._served = Served(package, self._engine, settings.max_tokens, calls)
        self._access, self._beside = access, Shared(package.content.id, meter, settings.traffic)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """What Ray Serve calls for the HTTP application."""
        return build_http(self._served, self._access, self._beside)

    async def check_health(self) -> None:
        """What Ray Serve calls now and then; an error has the replica replaced."""
        await asyncio.to_thread(self._engine.check)


def load_engine(package: Package, settings: Serve) -> TextEngine | ClassifierEngine:
    """The engine for the package's kind, with its model loaded."""
    if package.content.kind == "text":
        return LlamaCpp(package.model, settings.threads, settings.slots, reuse_prefix=True)
    return OnnxClassifier(package.model, settings.threads)
