"""The HTTP server in front of all replicas: an ASGI application in a process that holds no model.

It listens itself, without Ray Serve's own proxies: they cost more than twice as much time, know no TLS behind their
fast variant, and leave their limits to the client.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
import time
from collections.abc import Coroutine, Mapping
from dataclasses import replace
from functools import partial

import uvicorn
from starlette.exceptions import HTTPException

from overproof.config import Serve
from overproof.errors import InputError
from overproof.serve.access_log import AccessLog
from overproof.serve.api_keys import ApiKey, RateLimiter
from overproof.serve.async_engine import Busy, Work
from overproof.serve.canary import VersionStats
from overproof.serve.controller import RoutingTable, version_copy
from overproof.serve.controller_handle import get_or_create_controller, unwrap_remote_errors
from overproof.serve.deployments import ModelDeployment, Version
from overproof.serve.http_limits import LimitedHttpProtocol
from overproof.serve.metrics import ServeMetrics, gather_metrics
from overproof.serve.middleware import Access, Telemetry
from overproof.serve.model_registry import ShadowRequest, unknown_model
from overproof.serve.net import listening_socket, tls_context
from overproof.serve.ray_serve import listen_on_loopback, node_ip_address
from overproof.serve.request_source import SourcePolicy
from overproof.serve.response_builder import ServedModel
from overproof.serve.router import ReplicaServer
from overproof.serve.routes import build_app
from overproof.serve.tls_server import TlsServer
from overproof.serve.traffic import Recorder, in_sample

LOG = logging.getLogger("ray.serve")
MAX_SHADOW_REQUESTS = 8  # replayed or compared at once; more are left out
DRAIN_TIMEOUT_S = 300
KEEP_ALIVE_S = 75  # longer than proxies in front of a server usually keep a connection
RETRY_S = 0.5
METRICS_S = 1.0
QUEUED_PER_SLOT = 16  # requests that wait for a replica before more are refused


class Gateway:
    """The Serve deployment that listens: a replica of it for each gateway."""

    async def __init__(  # type: ignore[misc]
        self, packages: Mapping[str, Serve], settings: Serve, access: Access
    ) -> None:
        listen_on_loopback()
        metrics, limiter = ServeMetrics(), RateLimiter()
        self._router, self._drain_notice_s = ModelRouter(settings, metrics, limiter), settings.drain_notice_s
        await self._router.start(packages)
        recorder = None if settings.traffic is None else Recorder(settings.traffic)
        app = build_app(self._router, access, GatewayTelemetry(limiter, recorder, metrics), SourcePolicy.of(settings))
        self._access_log = AccessLog(app, settings.log_prompts)
        config = uvicorn.Config(
            self._access_log,
            http=LimitedHttpProtocol,
            timeout_keep_alive=KEEP_ALIVE_S,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # see SourcePolicy
            timeout_graceful_shutdown=DRAIN_TIMEOUT_S,
        )
        context = tls_context(settings)
        self._server = uvicorn.Server(config) if context is None else TlsServer(config, context)
        self._serving = asyncio.ensure_future(self._server.serve([listening_socket(settings.host, settings.port)]))
        while not self._server.started:
            if self._serving.done():
                await self._serving
                raise RuntimeError("the HTTP server ended")
            await asyncio.sleep(0.01)

    async def check_health(self) -> None:
        """Called by Ray Serve now and then; after an error it replaces the gateway."""
        if self._serving.done():
            raise RuntimeError("the HTTP server ended")

    async def __del__(self) -> None:
        """Called by Ray Serve at the end: ``/readyz`` says so for a while, then open streams are finished."""
        self._router.draining = True
        await asyncio.sleep(self._drain_notice_s)
        self._server.should_exit = True
        await self._serving
        self._access_log.flush()
        self._router.close()


class ModelRouter:
    """The ``ModelRegistry`` of all that is deployed: follows the controller, and sends requests to replicas."""

    def __init__(self, settings: Serve, metrics: ServeMetrics, limiter: RateLimiter) -> None:
        self._settings, self._metrics, self._limiter = settings, metrics, limiter
        self.draining = False
        self._controller = get_or_create_controller(settings)
        self._replica_server = ReplicaServer()
        self._table: RoutingTable | None = None
        self._served: dict[str, tuple[Version, ServedModel]] = {}  # by package
        self._stats: dict[str, VersionStats] = {}  # by package, since the last poll
        self._shadow_tasks: set[asyncio.Task[None]] = set()
        self.ready = asyncio.Event()
        self._polling: asyncio.Future[None] | None = None

    async def start(self, packages: Mapping[str, Serve]) -> None:
        """Have the controller start these packages; return when everything that is deployed answers."""
        self._address = await self._replica_server.listen(node_ip_address())
        await self._controller.start.remote(self._settings, packages, self._address)
        self._polling = asyncio.ensure_future(self._poll_forever())
        await self.ready.wait()

    def close(self) -> None:
        """Stop following the controller, and hang up on the replicas."""
        if self._polling is not None:
            self._polling.cancel()
        self._replica_server.close()

    def models(self) -> list[ServedModel]:
        return [self._served_model(deployment.stable) for deployment in self._models.values()]

    async def find(self, model: str | None, session: str | None) -> ServedModel:
        version, is_assigned = self._select_version(model, session)
        if version.package not in self._loaded:
            try:
                with unwrap_remote_errors():
                    await self._controller.load.remote(version.package)
            except InputError as error:
                raise HTTPException(503, str(error)) from None
        served = self._served_model(version)
        return served if is_assigned else replace(served, is_assigned=False)

    async def check(self) -> None:
        """Every stable version has a replica, or gets one at the next request."""
        for deployment in self._models.values():
            if not self._can_answer(deployment.stable):
                package = deployment.stable.package
                raise HTTPException(503, f"{package} has no replica that answers; one is being started")

    async def check_ready(self) -> None:
        if self.draining:
            raise HTTPException(503, "this gateway is going; ask another one")
        stable = [deployment.stable for deployment in self._models.values()]
        if stable and not any(map(self._can_answer, stable)):
            raise HTTPException(503, "no model has a replica that this gateway reaches")

    def on_request(self, served: ServedModel, request: ShadowRequest) -> None:
        package = served.model.overproof.package
        deployment = self._models.get(served.model.id)
        if deployment is None or not served.is_assigned:
            return
        stable, shadow, canary = deployment.stable, deployment.shadow, deployment.canary
        if shadow is not None and package == stable.package:
            self._in_background(self._replay(stable, shadow, request))
        if canary is not None and package == canary.package and random.random() < canary.settings.canary.compare:
            self._in_background(self._compare(stable, canary, request))

    def on_complete(self, served: ServedModel, failed: bool) -> None:
        package = served.model.overproof.package
        self._stats_of(package)  # which says that it is used
        if served.is_assigned:
            self._count(package, failed)

    def _can_answer(self, version: Version) -> bool:
        """Whether it has a replica, or gets one at the next request."""
        on_demand = version.settings.min_replicas == 0 or version.package not in self._loaded
        return on_demand or self._replica_server.pool(version.package).load.replicas > 0

    @property
    def _loaded(self) -> frozenset[str]:
        return frozenset() if self._table is None else self._table.loaded

    @property
    def _models(self) -> dict[str, ModelDeployment]:
        return {} if self._table is None else self._table.deployments.models

    def _select_version(self, model: str | None, session: str | None) -> tuple[Version, bool]:
        """The version that answers, and whether it was assigned to the session rather than named."""
        models = self._models
        if model is None and len(models) == 1:
            model = next(iter(models))
        if model in models:
            return pick_version(models[model], session), True
        for deployment in models.values():
            for version in deployment.versions:
                if version.package == model:
                    return version, False
        raise unknown_model(model, self.models())

    def _served_model(self, version: Version) -> ServedModel:
        cached = self._served.get(version.package)
        if cached is None or cached[0] != version:
            pool = self._replica_server.pool(version.package)
            pool.queued_per_replica = QUEUED_PER_SLOT * version.settings.slots
            opened = partial(version_copy, version, self._settings)
            cached = version, ServedModel(version.model, pool, version.settings.max_tokens, opened)
            self._served[version.package] = cached
        return cached[1]

    def _stats_of(self, package: str) -> VersionStats:
        return self._stats.setdefault(package, VersionStats())

    def _count(self, package: str, failed: bool) -> None:
        stats = self._stats_of(package)
        stats.requests += 1
        stats.failed += failed
        self._metrics.on_judged(package, failed)

    def _in_background(self, coroutine: Coroutine[None, None, None]) -> None:
        if len(self._shadow_tasks) >= MAX_SHADOW_REQUESTS:
            coroutine.close()
            return
        task = asyncio.ensure_future(coroutine)
        self._shadow_tasks.add(task)
        task.add_done_callback(self._shadow_tasks.discard)

    async def _replay(self, stable: Version, shadow: Version, request: ShadowRequest) -> None:
        failed = False
        try:
            await request.replay(self._served_model(shadow))
        except (Busy, InputError):  # no fault of the version: another may take other columns
            return
        except Exception:
            failed = True
            LOG.exception("a shadow failed")
        self._count(shadow.package, failed)
        await self._compare(stable, shadow, request)

    async def _compare(self, stable: Version, candidate: Version, request: ShadowRequest) -> None:
        with contextlib.suppress(Exception):  # failures are counted where they are answered
            of_stable, own = await asyncio.gather(
                *(request.compare(self._served_model(version)) for version in (stable, candidate))
            )
            agree = request.agree(of_stable.answer, own.answer)
            self._stats_of(candidate.package).compare(of_stable, own, agree)
            self._metrics.on_comparison(candidate.package, agree)

    async def _poll_forever(self) -> None:
        """Route by the controller's latest table, and report what was measured."""
        while True:
            stats, self._stats = self._stats, {}
            spent = self._limiter.take_spent()
            loads = self._replica_server.loads
            self._metrics.on_loads(loads)
            try:
                revision = -1 if self._table is None else self._table.revision
                requests = {package: load.requests for package, load in loads.items()}
                self._table = await self._controller.poll.remote(self._address, revision, stats, requests, spent)
                self._limiter.charge_elsewhere(self._table.spent)
                deployed = {version.package for version in self._table.deployments.versions}
                self._served = {package: cached for package, cached in self._served.items() if package in deployed}
                self._replica_server.discard_others(deployed)
                self.ready.set()
            except Exception:  # while the controller is being replaced the last table holds
                LOG.exception("the controller does not answer")
                await asyncio.sleep(RETRY_S)
                if self._table is not None:
                    await self._restart_controller()

    async def _restart_controller(self) -> None:
        """Have a controller that has started anew restore what is deployed from its file."""
        with contextlib.suppress(Exception):  # the next poll tries again
            self._controller = await asyncio.to_thread(get_or_create_controller, self._settings)
            await self._controller.start.remote(self._settings, {}, self._address)


def pick_version(deployment: ModelDeployment, session: str | None) -> Version:
    """The version that answers: a canary gets its share of the sessions, always the same ones, which nobody outside can
    tell beforehand.
    """
    if deployment.canary is None:
        return deployment.stable
    key = f"{deployment.salt} {deployment.canary.package} {secrets.token_hex(8) if session is None else session}"
    return deployment.canary if in_sample(key, deployment.canary.settings.canary.share) else deployment.stable


class GatewayTelemetry(Telemetry):
    """Adds the metrics of Ray to what every server counts."""

    def __init__(self, limiter: RateLimiter, recorder: Recorder | None, metrics: ServeMetrics) -> None:
        super().__init__(limiter, recorder)
        self._metrics = metrics
        self._page: asyncio.Task[str] | None = None  # the newest, or the one that is being gathered
        self._gathered_s = 0.0

    def on_work(self, package: str, key: ApiKey | None, work: Work) -> None:
        super().on_work(package, key, work)
        self._metrics.on_work(package, work)

    def on_first_event(self, package: str, seconds: float) -> None:
        self._metrics.on_first_event(package, seconds)

    async def metrics(self) -> str:
        """The metrics of all nodes, ``METRICS_S`` old at most: who asks meanwhile gets the same page."""
        if self._page is None or (self._page.done() and time.monotonic() - self._gathered_s > METRICS_S):
            self._page, self._gathered_s = asyncio.ensure_future(asyncio.to_thread(gather_metrics)), time.monotonic()
        return await asyncio.shield(self._page)
