"""The one actor that changes what is deployed: it starts versions, moves traffic to them, and rolls failing ones back.

Gateways poll it for the routing table; replicas ask it for the gateways' addresses.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import ray

from overproof.config import Serve
from overproof.errors import InputError
from overproof.package.package import load_package, open_served_copy, resolve_package
from overproof.package.private_copy import PrivateCopy, Say
from overproof.serve import ray_serve
from overproof.serve.api_keys import Spent
from overproof.serve.autoscaler import log_failure
from overproof.serve.canary import VersionStats, rollback_reason
from overproof.serve.deployments import (
    Deployments,
    Role,
    Version,
    application_name,
    read_deployments,
    write_deployments,
)
from overproof.serve.package_trust import trust_policy
from overproof.serve.response_builder import model_info
from overproof.serve.rpc import GatewayAddress
from overproof.serve.version_loader import VersionLoader

LOG = logging.getLogger("ray.serve")
POLL_S = 0.5  # the longest that a poll waits for a change, and so how often a gateway reports its load
LOST_S = 10.0  # without a poll, after which a gateway counts no more
GATEWAY_TIMEOUT_S = 30.0  # without a poll, after which the controller ends
ROLLBACK_PATIENCE_S = 10.0  # for as many replicas as the version has that is taken back
ACK_TIMEOUT_S = 10.0  # the longest that a change waits for every gateway to route by it
SYSTEM_USER = "overproof"
TAKEN_BACK = ("rollback", "automatic rollback", "undeploy")  # changes that a deployment in progress must not undo


@dataclass(frozen=True)
class RoutingTable:
    """What gateways route by; a later one has a higher revision."""

    revision: int
    deployments: Deployments
    loaded: frozenset[str]  # packages that have replicas, or get them without being loaded again
    spent: Spent = field(default_factory=dict)  # of keys' limits, through other gateways since the last poll


@dataclass
class GatewayState:
    """What is known of a gateway."""

    last_poll_s: float  # infinity while it starts
    acknowledged: int | None = None  # the revision that it routes by; None before its first poll
    loads: Mapping[str, int] = field(default_factory=dict)  # requests by package
    spent: Counter[tuple[str, str, int]] = field(default_factory=Counter)  # through others, since its last poll


class Controller:
    """Keeps the deployments and carries out their changes, one at a time; versions load before that, beside each other.

    So a rollback overtakes a deployment whose version does not come up, which then changes nothing.
    """

    def __init__(self, settings: Serve) -> None:
        self._deployments, self._settings = Deployments(), settings
        self._revision = time.time_ns()  # so that a restarted controller counts on from higher
        self._stats: dict[str, VersionStats] = {}  # by package, since it was started
        self._loader = VersionLoader(self._notify)
        self._in_use: Counter[str] = Counter()  # packages that a change in progress needs, deployed or not
        self._gateways: dict[GatewayAddress, GatewayState] = {}
        self._changed, self._change_lock = asyncio.Condition(), asyncio.Lock()
        self._last_poll_s = time.monotonic()
        self._restored: asyncio.Future[None] | None = None
        self._reloading: asyncio.Future[Any] | None = None  # the versions that were deployed before
        self._known = asyncio.Event()  # what is deployed
        self._started_with: tuple[Serve, Mapping[str, Serve]] | None = None
        self._exit: asyncio.Future[None] | None = None

    async def start(
        self, settings: Serve, packages: Mapping[str, Serve], gateway: GatewayAddress | None = None
    ) -> None:
        """Start these packages and what the deployments file names; return when all of it answers, but for what the
        file names and does not come up: that is tried again when it is asked for.

        Called by whoever starts the gateway, and by the gateway with its address, which does not wait for what was
        deployed before: requests do.

        Raises:
            InputError: a package that was not deployed before cannot be served, or the file cannot be read.
        """
        self._last_poll_s = time.monotonic()
        ray_serve.forget_serve_client()  # it may be of a Ray Serve that has ended since
        self._exit = self._exit or asyncio.ensure_future(self._exit_when_unused())
        if gateway is not None:
            (await self._gateway(gateway)).last_poll_s = math.inf
        if self._restored is None or self._started_with != (settings, packages) or not await self._is_restored():
            self._settings, self._started_with = settings, (settings, packages)
            self._restored = asyncio.ensure_future(self._restore(packages))
        try:
            await asyncio.shield(self._restored)
        finally:
            if gateway is not None:
                (await self._gateway(gateway)).last_poll_s = time.monotonic()
        if gateway is None and self._reloading is not None:
            await asyncio.shield(self._reloading)

    async def gateways(self, known: frozenset[GatewayAddress]) -> frozenset[GatewayAddress]:
        """Where gateways take connections of replicas; a long poll that ends when these are not the known ones."""
        await self._wait_for_change(ACK_TIMEOUT_S, lambda: self._gateways.keys() != known)
        return frozenset(self._gateways)

    async def settings(self) -> Serve:
        """Settings of the server."""
        return self._settings

    async def deployments(self) -> Deployments:
        """What is deployed."""
        return self._deployments

    async def stats(self) -> dict[str, VersionStats]:
        """What was measured of each package since it was started."""
        return self._stats

    async def deploy(self, location: str, settings: Serve, role: Role, user: str) -> Version:
        """Start a version with as many replicas as its traffic needs now, and route it there once all of them answer.

        Raises:
            InputError: the package may not be served in this role, or not every replica starts; nothing has changed.
        """
        version = await asyncio.to_thread(describe_version, location, settings, self._settings)
        self._deployments.deployed(version, role, user)  # refuses what may not be, before it is loaded
        began, name = len(self._deployments.events), version.model.id
        share = {"stable": 1.0, "canary": settings.canary.share, "shadow": 0.0}[role]
        replicas = ceil(share * self._stable_replicas(name))
        async with self._loaded(version, user, replicas), self._change_lock:
            later = self._deployments.events[began:]
            if taken := next((e for e in later if e.model == name and e.change in TAKEN_BACK), None):
                raise InputError(
                    f"{name}: {taken.change} by {taken.user} while {version.package} was being loaded; nothing has "
                    "changed by this deployment: deploy again if it is still wanted"
                )
            await self._apply(self._deployments.deployed(version, role, user))
        return version

    async def promote(self, name: str, user: str) -> str:
        """Make a model's candidate its stable version, once it has as many replicas as that; gives its package.

        Raises:
            InputError: there is no candidate, or it cannot have so many; nothing has changed.
        """
        candidate = self._deployments.promoted(name, user).models[name].stable
        async with self._loaded(candidate, user, self._stable_replicas(name)), self._change_lock:
            promoted = self._deployments.promoted(name, user)
            if promoted.models[name].stable != candidate:
                raise InputError(f"{name}: another version is being tried now; look at `overproof deployments`")
            await self._apply(promoted)
            return candidate.package

    async def roll_back(self, name: str, user: str, reason: str = "") -> str:
        """Remove a model's candidate, else return to its previous version; gives the package that answers. What is
        being deployed is given up: where there is nothing to return to, that is all, and its package is given. What is
        taken back may be harmful: for as many replicas as it has it waits ``ROLLBACK_PATIENCE_S``, then one is enough.
        """
        given_up = await self._loader.give_up(name)
        if given_up and self._deployments.is_first(name):
            return given_up
        target = self._deployments.rolled_back(name, user, reason).models[name].stable
        replicas = self._stable_replicas(name)
        async with self._loaded(target, user, replicas, ROLLBACK_PATIENCE_S), self._change_lock:
            await self._apply(self._deployments.rolled_back(name, user, reason))
            return self._deployments.models[name].stable.package

    async def undeploy(self, name: str, user: str) -> None:
        """Stop serving a model, and give up what is being deployed."""
        given_up = await self._loader.give_up(name)
        async with self._change_lock:
            if name in self._deployments.models or not given_up:
                await self._apply(self._deployments.undeployed(name, user))

    async def load(self, package: str) -> None:
        """Start a version that was evicted."""
        version = next((v for v in self._deployments.versions if v.package == package), None)
        if version is not None:
            async with self._loaded(version, SYSTEM_USER):
                await self._notify()

    async def poll(
        self,
        gateway: GatewayAddress,
        revision: int,
        stats: Mapping[str, VersionStats],
        loads: Mapping[str, int],
        spent: Spent,
    ) -> RoutingTable:
        """Take in what a gateway measured and what keys spent there since its last poll, and the requests that each
        package has there now; give the routing table: a long poll that ends when there is a later one than
        ``revision``.
        """
        if self._restored is None:
            raise RuntimeError("this controller has been restarted, and nobody has called start() yet")
        known: asyncio.Future[Any] = asyncio.ensure_future(self._known.wait())
        awaited: list[asyncio.Future[Any]] = [self._restored, known]
        await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
        known.cancel()
        now_s = self._last_poll_s = time.monotonic()
        for package, measured in stats.items():
            self._stats.setdefault(package, VersionStats()).add(measured)
        self._loader.touch(stats)
        self._check_candidates()
        state = await self._gateway(gateway)
        state.last_poll_s, state.loads = now_s, loads
        for other in self._gateways.values():
            if other is not state:
                other.spent.update(spent)
        for version in self._deployments.versions:
            requests = sum(each.loads.get(version.package, 0) for each in self._gateways.values())
            self._loader.autoscaler.observe(version, requests, now_s)
        async with self._changed:
            state.acknowledged = revision
            self._changed.notify_all()
        await self._wait_for_change(POLL_S, lambda: self._revision > revision)
        elsewhere, state.spent = dict(state.spent), Counter()
        return RoutingTable(self._revision, self._deployments, self._loader.loaded, elsewhere)

    async def _gateway(self, address: GatewayAddress) -> GatewayState:
        """What is known of a gateway, which replicas hear of where it is new; those that are lost are forgotten."""
        now_s = time.monotonic()
        lost = {each for each, state in self._gateways.items() if now_s - state.last_poll_s > LOST_S} - {address}
        if lost or address not in self._gateways:
            async with self._changed:
                for each in lost:
                    self._gateways.pop(each, None)
                self._gateways.setdefault(address, GatewayState(now_s))
                self._changed.notify_all()
        return self._gateways[address]

    async def _is_restored(self) -> bool:
        """Whether the last ``start`` goes on or has succeeded and holds: a new gateway then need not wait for a change
        in progress.
        """
        assert self._restored is not None
        if not self._restored.done():
            return True
        present = await _replica_counts()
        return self._restored.exception() is None and all(
            application_name(package) in present for package in self._loader.loaded
        )

    async def _restore(self, packages: Mapping[str, Serve]) -> None:
        self._loader.memory_mb, self._loader.server = self._settings.memory_mb, self._settings
        async with self._change_lock:
            self._deployments = deployments = await asyncio.to_thread(read_deployments, self._deployments_uri)
            present = await _replica_counts()
            self._loader.adopt(deployments.versions, present)
            kept = {version.package for version in deployments.versions} | self._needed
            for orphan in set(present) - set(map(application_name, kept)):  # left by a change that was interrupted
                await asyncio.to_thread(ray_serve.delete_application, orphan, wait=False)
            self._known.set()
        self._reloading = asyncio.gather(*map(self._reload, deployments.versions))
        for location, settings in packages.items():
            await self._deploy_given(location, settings)
        await self._notify(wait=False)
        await self._stop_unused()

    async def _reload(self, version: Version) -> None:
        """Start a version that was deployed before; where it does not come up, the next request tries again."""
        try:
            async with self._loaded(version, SYSTEM_USER):
                await self._notify(wait=False)
        except Exception:
            LOG.exception("%s is deployed, and does not start", version.package)

    async def _deploy_given(self, location: str, settings: Serve) -> None:
        """Deploy a package that serving was started with, unless it is."""
        known = [deployment.stable for deployment in self._deployments.models.values()]
        try:
            version = await asyncio.to_thread(describe_version, location, settings, self._settings)
        except InputError:
            if any(version.location == location for version in known):  # it was good, and may be again
                LOG.exception("%s is deployed, and cannot be read", location)
                return
            raise
        if version in known:
            return
        async with self._loaded(version, SYSTEM_USER), self._change_lock:
            await self._apply(self._deployments.deployed(version, "stable", SYSTEM_USER), wait=False)

    @contextlib.asynccontextmanager
    async def _loaded(
        self, version: Version, user: str, replicas: int = 0, patience_s: float | None = None
    ) -> AsyncIterator[None]:
        """While a change needs a version: it is loaded, as ``VersionLoader.start`` does, and stopped in the end where
        it is not deployed.

        Raises:
            InputError: it does not start; the event log says so.
        """
        package = version.package
        self._in_use[package] += 1
        try:
            if await self._loader.start(version, replicas, patience_s):
                self._stats.pop(package, None)
            yield
        except InputError as error:
            if package not in self._loader.loaded:
                self._deployments = self._deployments.with_event(version.model.id, user, "failed", package, str(error))
                with contextlib.suppress(InputError):  # a file that cannot be written is no reason to say less
                    await self._save(self._deployments)
            raise
        finally:
            self._in_use[package] -= 1
            await self._stop_unused()

    async def _exit_when_unused(self) -> None:
        """End this actor when no gateway has polled for long: serving was stopped without a word to it."""
        while time.monotonic() - self._last_poll_s < GATEWAY_TIMEOUT_S:
            if self._change_lock.locked() or self._loader.busy:  # models may load for minutes before a gateway polls
                self._last_poll_s = time.monotonic()
            await asyncio.sleep(POLL_S)
        ray.actor.exit_actor()  # type: ignore[no-untyped-call]

    def _stable_replicas(self, name: str) -> int:
        """Replicas of the version that answers for a model now."""
        deployment = self._deployments.models.get(name)
        return 0 if deployment is None else self._loader.autoscaler.target(deployment.stable.package)

    @property
    def _needed(self) -> set[str]:
        return {package for package, users in self._in_use.items() if users}

    @property
    def _deployments_uri(self) -> str:
        assert self._settings.deployments is not None
        return self._settings.deployments

    def _check_candidates(self) -> None:
        """Roll back, in the background, every candidate that breaks its limits."""
        for name, deployment in self._deployments.models.items():
            candidate = deployment.candidate
            if candidate is None:
                continue
            tried = self._stats.setdefault(candidate.package, VersionStats())
            reason = rollback_reason(candidate.settings.canary, tried)
            if reason is not None and not self._change_lock.locked():
                log_failure(asyncio.ensure_future(self._roll_back_candidate(name, candidate, reason)))

    async def _roll_back_candidate(self, name: str, candidate: Version, reason: str) -> None:
        async with self._change_lock:
            deployment = self._deployments.models.get(name)
            if deployment is not None and deployment.candidate == candidate:
                await self._apply(self._deployments.rolled_back(name, SYSTEM_USER, reason, "automatic rollback"))

    async def _apply(self, deployments: Deployments, wait: bool = True) -> None:
        """Save the deployments, have gateways route by them, and stop the packages that they leave out."""
        await self._save(deployments)
        await self._notify(wait)
        await self._stop_unused()

    async def _stop_unused(self) -> None:
        deployed = {version.package for version in self._deployments.versions}
        await self._loader.stop(set(self._loader.loaded) - deployed - self._needed)

    async def _save(self, deployments: Deployments) -> None:
        await asyncio.to_thread(write_deployments, self._deployments_uri, deployments)
        self._deployments = deployments

    async def _notify(self, wait: bool = True) -> None:
        """Publish a new revision of the routing table, and wait until every gateway routes by it."""
        async with self._changed:
            self._revision += 1
            revision = self._revision
            self._changed.notify_all()
        if wait:  # no longer than this: a gateway that is being replaced polls when it is there
            await self._wait_for_change(ACK_TIMEOUT_S, lambda: self._is_acknowledged(revision))

    def _is_acknowledged(self, revision: int) -> bool:
        """By every gateway; one that has not polled yet begins with the latest."""
        known = [state.acknowledged for state in self._gateways.values() if state.acknowledged is not None]
        return bool(known) and min(known) >= revision

    async def _wait_for_change(self, timeout_s: float, happened: Callable[[], bool]) -> None:
        """Wait until something happened, or for so long."""
        async with self._changed:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._changed.wait_for(happened)


def describe_version(location: str, settings: Serve, server: Serve | None = None, say: Say = LOG.info) -> Version:
    """A package, verified, as a version; ``server`` says what is trusted, where it is not these settings themselves.

    Raises:
        InputError: it may not be served.
    """
    location = resolve_package(location)
    package = load_package(location, trust_policy(server or settings), say=say)
    measured = package.measured.metrics.get("resident_mb")
    resident_mb = package.size_bytes / 1e6 if measured is None else measured.value
    resident_mb += package.draft[0].stat().st_size / 1e6 if package.draft else 0.0
    return Version(
        model=model_info(package),
        location=location,
        contents_sha256=package.listing.sha256,
        settings=settings,
        resident_mb=resident_mb,
    )


def version_copy(version: Version, server: Serve) -> PrivateCopy:
    """The files of a version on this machine.

    Raises:
        InputError: it may not be served by a server with these settings, or cannot be read any more.
    """
    return open_served_copy(version.location, trust_policy(server), version.contents_sha256)


def count_replicas(package: str) -> int:
    """Replicas of a package that run."""
    return ray_serve.replica_counts(application_name(package)).get(application_name(package), 0)


async def _replica_counts() -> dict[str, int]:
    return await asyncio.to_thread(ray_serve.replica_counts, application_name(""))
