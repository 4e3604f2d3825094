"""The HTTP server in front of all replicas: an ASGI application in a process that holds no model.

It listens by itself, for Ray Serve's own proxies cost more than twice as much time, know no TLS behind their fast
variant, and leave their limits to the client.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
import socket
import time
from collections.abc import Mapping
from typing import Any

import uvicorn
from ray.util import get_node_ip_address
from starlette.exceptions import HTTPException

from overproof.config import Serve
from overproof.errors import InputError
from overproof.serve.access_log import AccessLog
from overproof.serve.api_keys import ApiKey
from overproof.serve.async_engine import Busy
from overproof.serve.canary import VersionStats
from overproof.serve.controller import RoutingTable, get_or_create_controller, unwrap_remote_errors
from overproof.serve.deployments import ModelDeployment, Version
from overproof.serve.http_limits import LimitedHttpProtocol
from overproof.serve.metrics import ServeMetrics as Figures
from overproof.serve.metrics import gather_metrics
from overproof.serve.middleware import Access, Telemetry
from overproof.serve.model_registry import ShadowRequest, unknown_model
from overproof.serve.response_builder import ServedModel
from overproof.serve.responses import Usage
from overproof.serve.router import ReplicaServer
from overproof.serve.routes import build_app
from overproof.serve.traffic import Recorder, in_sample

LOG = logging.getLogger("ray.serve")
TOLD_EVERY_S = 0.5
COPIES = 8  # requests at once that go to a shadow, or are compared; more are not
BACKLOG = 2048
DRAIN_S = 300
KEEP_ALIVE_S = 75  # longer than what stands in front of a server usually keeps a connection
RETRY_S = 0.5
QUEUED_PER_SLOT = 16  # requests that wait for a replica before more are refused


class ModelRouter:
    """The house that the desk keeps: models with versions, of which some are tried."""

    def __init__(self, settings: Serve, figures: Figures) -> None:
        self._settings, self._desk = settings, get_or_create_controller(settings)
        self._routes: RoutingTable | None = None
        self._served: dict[str, tuple[Version, ServedModel]] = {}  # by package
        self._tallies: dict[str, VersionStats] = {}
        self._copies: set[asyncio.Task[None]] = set()
        self._switchboard, self._figures = ReplicaServer(), figures
        self.ready = asyncio.Event()
        self._following = asyncio.ensure_future(self._follow())

    def models(self) -> list[ServedModel]:
        return [self._of(line.stable) for line in self._lines.values()]

    async def find(self, model: str | None, session: str | None) -> ServedModel:
        version = self._version(model, session)
        if version.package not in self._loaded:
            try:
                with unwrap_remote_errors():
                    await self._desk.load.remote(version.package)
            except InputError as error:
                raise HTTPException(503, str(error)) from None
        return self._of(version)

    async def check(self) -> None:
        """Every model has a replica that has answered, or starts one when it is asked."""
        for line in self._lines.values():
            version = line.stable
            waits = version.settings.min_replicas == 0 or version.package not in self._loaded
            if not waits and self._switchboard.crew(version.package).load.replicas == 0:
                raise HTTPException(503, f"{version.package} has no replica that answers; one is being started")

    def asked(self, served: ServedModel, asked: ShadowRequest) -> None:
        package = served.model.overproof.package
        line = self._lines.get(served.model.id)
        if line is None:
            return
        if line.shadow is not None and package == line.stable.package:
            self._beside(self._shadow(line.stable, line.shadow, asked))
        tried = line.canary
        if tried is not None and package == tried.package and random.random() < tried.settings.canary.compare:
            self._beside(self._compare(line.stable, tried, asked))

    def ended(self, served: ServedModel, seconds: float, failed: bool) -> None:
        self._count(served.model.overproof.package, seconds, failed)

    def close(self) -> None:
        """Follow no longer."""
        self._following.cancel()
        self._switchboard.close()

    async def _hire_again(self) -> None:
        """A desk that starts anew opens the house from its book."""
        with contextlib.suppress(Exception):  # tried again, until there is one
            self._desk = await asyncio.to_thread(get_or_create_controller, self._settings)
            await self._desk.open.remote(self._settings, {}, self._door)

    async def open(self, packages: Mapping[str, Serve]) -> None:
        """Return when everything that is deployed answers."""
        self._door = await self._switchboard.open(get_node_ip_address())  # type: ignore[no-untyped-call]
        await self._desk.open.remote(self._settings, packages, self._door)
        await self.ready.wait()

    @property
    def _loaded(self) -> frozenset[str]:
        return frozenset() if self._routes is None else self._routes.loaded

    @property
    def _lines(self) -> dict[str, ModelDeployment]:
        return {} if self._routes is None else self._routes.book.lines

    def _version(self, model: str | None, session: str | None) -> Version:
        lines = self._lines
        if model is None and len(lines) == 1:
            model = next(iter(lines))
        if model in lines:
            return pick_version(lines[model], session)
        for line in lines.values():
            for version in line.live:
                if version.package == model:
                    return version
        raise unknown_model(model, self.models())

    def _of(self, version: Version) -> ServedModel:
        found = self._served.get(version.package)
        if found is None or found[0] != version:
            crew = self._switchboard.crew(version.package)
            crew.most_waiting = QUEUED_PER_SLOT * version.settings.slots
            found = version, ServedModel(version.model, crew, version.settings.max_tokens)
            self._served[version.package] = found
        return found[1]

    def _count(self, package: str, seconds: float, failed: bool) -> None:
        tally = self._tallies.setdefault(package, VersionStats())
        tally.requests += 1
        tally.failed += failed
        if not failed:
            tally.seconds.append(seconds)

    def _beside(self, work: Any) -> None:
        if len(self._copies) >= COPIES:
            work.close()
            return
        task = asyncio.ensure_future(work)
        self._copies.add(task)
        task.add_done_callback(self._copies.discard)

    async def _shadow(self, stable: Version, shadow: Version, asked: ShadowRequest) -> None:
        began_s, failed = time.perf_counter(), False
        try:
            await asked.whole(self._of(shadow).backend)
        except Busy:
            return
        except Exception:
            failed = True
            LOG.exception("a shadow failed")
        self._count(shadow.package, time.perf_counter() - began_s, failed)
        await self._compare(stable, shadow, asked)

    async def _compare(self, stable: Version, tried: Version, asked: ShadowRequest) -> None:
        with contextlib.suppress(Exception):  # what fails is counted where it answers
            old, new = await asyncio.gather(*(asked.alike(self._of(v).backend) for v in (stable, tried)))
            tally = self._tallies.setdefault(tried.package, VersionStats())
            tally.compared += 1
            tally.alike += old == new

    async def _follow(self) -> None:
        """Hear of every change, and tell what was counted."""
        while True:
            tallies, self._tallies = self._tallies, {}
            loads = self._switchboard.loads
            self._figures.loads(loads)
            try:
                seen = -1 if self._routes is None else self._routes.number
                requests = {package: load.requests for package, load in loads.items()}
                self._routes = await self._desk.poll.remote(seen, tallies, requests)
                live = {version.package for version in self._routes.book.live}
                self._served = {package: found for package, found in self._served.items() if package in live}
                self._switchboard.keep(live)
                self.ready.set()
            except Exception:  # the desk is being replaced: what is known goes on
                LOG.exception("the desk does not answer")
                await asyncio.sleep(RETRY_S)
                if self._routes is not None:
                    await self._hire_again()


def pick_version(line: ModelDeployment, session: str | None) -> Version:
    """The version that answers: a canary gets its share of the sessions, and always the same ones."""
    if line.canary is None:
        return line.stable
    ticket = f"{line.canary.package} {secrets.token_hex(8) if session is None else session}"
    return line.canary if in_sample(ticket, line.canary.settings.canary.share) else line.stable


class GatewayTelemetry(Telemetry):
    """What stands beside the gateway."""

    def __init__(self, recorder: Recorder | None, figures: Figures) -> None:
        super().__init__(recorder=recorder)
        self._figures = figures

    def used(self, package: str, key: ApiKey | None, usage: Usage) -> None:
        super().used(package, key, usage)
        self._figures.used(package, usage)

    def began(self, package: str, seconds: float) -> None:
        self._figures.began(package, seconds)

    async def metrics(self) -> str:
        return await gather_metrics()


class Gateway:
    """The deployment that listens."""

    async def __init__(  # type: ignore[misc]
        self, packages: Mapping[str, Serve], settings: Serve, access: Access
    ) -> None:
        figures = Figures()
        self._house = ModelRouter(settings, figures)
        await self._house.open(packages)
        recorder = None if settings.traffic is None else Recorder(settings.traffic)
        self._log = AccessLog(build_app(self._house, access, GatewayTelemetry(recorder, figures)), settings.log_prompts)
        self._server = uvicorn.Server(
            uvicorn.Config(
                self._log,
                http=LimitedHttpProtocol,
                timeout_keep_alive=KEEP_ALIVE_S,
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=DRAIN_S,
                ssl_certfile=settings.tls_certificate,
                ssl_keyfile=settings.tls_key,
            )
        )
        self._serving = asyncio.ensure_future(self._server.serve([listening_socket(settings.host, settings.port)]))
        while not self._server.started:
            if self._serving.done():
                await self._serving
                raise RuntimeError("the HTTP server ended")
            await asyncio.sleep(0.01)

    async def check_health(self) -> None:
        """What Ray Serve calls now and then; an error has the gateway replaced."""
        if self._serving.done():
            raise RuntimeError("the HTTP server ended")

    async def __del__(self) -> None:
        """What Ray Serve calls at the end: streams that go on are finished."""
        self._server.should_exit = True
        await self._serving
        self._log.flush()
        self._house.close()


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket; the gateway before it may still listen, until its streams are done."""
    opened = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
        opened.setsockopt(socket.SOL_SOCKET, option, 1)
    opened.bind((host, port))
    opened.listen(BACKLOG)
    opened.setblocking(False)
    return opened
