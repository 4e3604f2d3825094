"""The one place that changes what is deployed: it starts versions, moves traffic, and takes failing ones back."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayTaskError
from ray.serve.context import _set_global_client

from overproof.config import Serve
from overproof.errors import InputError
from overproof.package.package import fetch_package, open_package, resolve_package
from overproof.serve.autoscaler import Autoscaler, clamp_replicas, log_failure
from overproof.serve.canary import VersionStats, rollback_reason
from overproof.serve.deployments import (
    CONTROLLER,
    Deployments,
    Role,
    Version,
    application_name,
    read_deployments,
    write_deployments,
)
from overproof.serve.ray_serve import replica_counts, start_application, wait_until_running
from overproof.serve.replica import replica_application
from overproof.serve.response_builder import model_info
from overproof.serve.rpc import GatewayAddress

POLL_S = 0.5  # a gateway is answered at the latest, and so often tells the load
ALONE_S = 30.0
HEARD_S = 10.0  # the longest that a change waits for the gateway
GRACE_S = 0.5  # for requests between finding a version and asking it
ITSELF = "overproof"
ON_HEAD = {"node:__internal_head__": 0.001}  # where people look for the address


@contextlib.contextmanager
def unwrap_remote_errors() -> Iterator[None]:
    """What went wrong in an actor, as if it had gone wrong here."""
    try:
        yield
    except RayTaskError as error:
        raise error.cause from None


def get_or_create_controller(settings: Serve) -> Any:
    """The desk of this cluster, new where there is none."""
    return (
        ray.remote(Controller)
        .options(
            name=CONTROLLER,
            namespace=CONTROLLER,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            resources=ON_HEAD,
            max_restarts=-1,
            max_concurrency=1000,
        )
        .remote(settings)
    )


@dataclass(frozen=True)
class RoutingTable:
    """What the gateway goes by."""

    number: int
    book: Deployments
    loaded: frozenset[str]  # packages that have replicas, or may have them at once


class Controller:
    """An actor beside the gateway; it is alone, and all its changes come one after the other."""

    def __init__(self, settings: Serve) -> None:
        self._book, self._settings = Deployments(), settings
        self._number, self._heard = time.time_ns(), 0  # a desk that starts anew goes on counting
        self._used: dict[str, float] = {}  # loaded packages, and when each was last asked
        self._tallies: dict[str, VersionStats] = {}
        self._fleet = Autoscaler()
        self._door: GatewayAddress | None = None
        self._changed, self._one = asyncio.Condition(), asyncio.Lock()
        self._polled_s = time.monotonic()
        self._opened: asyncio.Future[None] | None = None
        self._asked: tuple[Serve, Mapping[str, Serve]] | None = None
        self._leaving: asyncio.Future[None] | None = None

    async def open(self, settings: Serve, packages: Mapping[str, Serve], door: GatewayAddress | None = None) -> None:
        """Have what is in the book answer, and these packages; the gateway asks for it when it starts, and says where
        replicas find it.

        Raises:
            InputError: a package cannot be served, or the book cannot be read.
        """
        self._polled_s = time.monotonic()
        _set_global_client(None)  # type: ignore[no-untyped-call]  # it may be of a Ray Serve that has ended since
        self._leaving = self._leaving or asyncio.ensure_future(self._leave())
        if door is not None:
            async with self._changed:
                self._door = door
                self._changed.notify_all()
        if self._opened is None or self._asked != (settings, packages) or not await self._is_open():
            self._settings, self._asked = settings, (settings, packages)
            self._opened = asyncio.ensure_future(self._restore(packages))
        await asyncio.shield(self._opened)

    async def _is_open(self) -> bool:
        """Whether what was asked for is being started, or is there: a new gateway waits for no change in progress."""
        assert self._opened is not None
        if not self._opened.done():
            return True
        present = await asyncio.to_thread(replica_counts)
        return self._opened.exception() is None and all(application_name(package) in present for package in self._used)

    async def door(self, seen: GatewayAddress | None) -> GatewayAddress | None:
        """Where the gateway takes calls of replicas; answered when it is not what was seen, or a while passed."""
        async with self._changed:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HEARD_S):
                    await self._changed.wait_for(lambda: self._door is not None and self._door != seen)
        return self._door

    async def settings(self) -> Serve:
        """Those of the house."""
        return self._settings

    async def deploy(self, where: str, settings: Serve, place: Role, who: str) -> Version:
        """Start a version, and when it answers let traffic come to it.

        Raises:
            InputError: the package may not be served, or there is no place for it; nothing has changed.
        """
        async with self._one:
            version = await asyncio.to_thread(describe_version, where, settings)
            book = self._book.deployed(version, place, who)
            await self._start(version, who)
            await self._go_by(book)
            return version

    async def promote(self, name: str, who: str) -> str:
        """Let the version that is tried answer; gives its package."""
        async with self._one:
            await self._go_by(self._book.promoted(name, who))
            return self._book.lines[name].stable.package

    async def roll_back(self, name: str, who: str, reason: str = "") -> str:
        """Take back what is tried, or return to the version before; gives the package that answers."""
        async with self._one:
            book = self._book.rolled_back(name, who, reason)
            await self._start(book.lines[name].stable, who)
            await self._go_by(book)
            return book.lines[name].stable.package

    async def withdraw(self, name: str, who: str) -> None:
        """Serve a model no longer."""
        async with self._one:
            await self._go_by(self._book.withdrawn(name, who))

    async def load(self, package: str) -> None:
        """Start a version that was evicted."""
        async with self._one:
            version = next((v for v in self._book.live if v.package == package), None)
            if version is not None:
                await self._start(version, ITSELF)
                await self._tell()

    async def book(self) -> Deployments:
        return self._book

    async def tallies(self) -> dict[str, VersionStats]:
        """What was seen of each package since it was started."""
        return self._tallies

    async def poll(self, seen: int, tallies: Mapping[str, VersionStats], loads: Mapping[str, int]) -> RoutingTable:
        """Take what the gateway counted, and the requests that each package has now; answer when the routes are other
        than those it has seen, or a while passed.
        """
        if self._opened is None:
            raise RuntimeError("this desk is new and has not been opened")
        await asyncio.wait([self._opened])
        now = self._polled_s = time.monotonic()
        for package, tally in tallies.items():
            self._tallies.setdefault(package, VersionStats()).add(tally)
            if package in self._used:
                self._used[package] = now
        self._judge()
        for version in self._book.live:
            self._fleet.see(version, loads.get(version.package, 0), now)
        async with self._changed:
            self._heard = max(self._heard, seen)
            self._changed.notify_all()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_S):
                    await self._changed.wait_for(lambda: self._number > seen)
        return RoutingTable(self._number, self._book, frozenset(self._used))

    async def _restore(self, packages: Mapping[str, Serve]) -> None:
        async with self._one:
            self._book = book = await asyncio.to_thread(read_deployments, self._uri)
            present = await asyncio.to_thread(replica_counts)
            self._used = {v.package: time.monotonic() for v in book.live if v.application in present}
            for version in book.live:
                if version.application in present:
                    self._fleet.put(version, present[version.application])
            of_the_book = {version.application for version in book.live}
            for orphan in set(present) - of_the_book:  # of a change that was cut off
                await asyncio.to_thread(partial(serve.delete, orphan, _blocking=False))
            for where, settings in packages.items():
                version = await asyncio.to_thread(describe_version, where, settings)
                line = book.lines.get(version.model.id)
                if line is None or line.stable != version:
                    book = book.deployed(version, "stable", ITSELF)
            for version in book.live:
                await self._start(version, ITSELF)
            await self._go_by(book, wait=False)

    async def _leave(self) -> None:
        """End when no gateway has asked for long: the house is closed."""
        while time.monotonic() - self._polled_s < ALONE_S:
            if self._one.locked():  # a gateway that opens waits for its models, which may take minutes to load
                self._polled_s = time.monotonic()
            await asyncio.sleep(POLL_S)
        ray.actor.exit_actor()  # type: ignore[no-untyped-call]

    @property
    def _uri(self) -> str:
        assert self._settings.deployments is not None
        return self._settings.deployments

    def _judge(self) -> None:
        """Ask for the removal of what is tried and fails its limits."""
        for name, line in self._book.lines.items():
            tried = line.tried
            if tried is not None:
                old, new = (self._tallies.setdefault(v.package, VersionStats()) for v in (line.stable, tried))
                reason = rollback_reason(tried.settings.canary, old, new)
                if reason is not None and not self._one.locked():
                    log_failure(asyncio.ensure_future(self._take_back(name, tried, reason)))

    async def _take_back(self, name: str, tried: Version, reason: str) -> None:
        async with self._one:
            line = self._book.lines.get(name)
            if line is not None and line.tried == tried:
                await self._go_by(self._book.rolled_back(name, ITSELF, reason, "automatic rollback"))

    async def _start(self, version: Version, who: str) -> None:
        """Have replicas of a version answer; one that was there is replaced by one with these settings.

        Raises:
            InputError: it does not start; what was there before goes on.
        """
        before = next((v for v in self._book.live if v.package == version.package), None)
        if version.package in self._used and before == version:
            return
        await self._make_room(version)
        known = self._fleet.take(version.package)
        count = clamp_replicas(version.settings, max(known, 1))
        kept = None if before is None or version.package not in self._used else (before, known)
        try:
            await asyncio.to_thread(_run, version, count)
            kept = version, count
        except RuntimeError as error:
            if kept is not None:
                await asyncio.to_thread(_run, *kept)
            else:
                await asyncio.to_thread(serve.delete, version.application)
            await self._write(self._book.noted(version.model.id, who, "failed", version.package, str(error)))
            raise InputError(f"{version.package} does not start, and nothing has changed: {error}") from None
        finally:
            if kept is not None:
                self._fleet.put(*kept)
        self._used[version.package] = time.monotonic()
        self._tallies.pop(version.package, None)

    async def _make_room(self, version: Version) -> None:
        """Evict the versions that were longest not asked for, until this one fits."""
        memory_mb = self._settings.memory_mb
        if memory_mb is None:
            return
        known = {v.package: v for v in self._book.live} | {version.package: version}
        if version.resident_mb > memory_mb:
            raise InputError(
                f"serve.memory_mb: {version.package} takes {version.resident_mb:.0f} MB; expected "
                f"{memory_mb:.0f} at most"
            )
        for package in sorted(self._used, key=self._used.__getitem__):
            others = sum(known[p].resident_mb for p in self._used if p in known and p != version.package)
            if others + version.resident_mb <= memory_mb:
                return
            if package != version.package:
                await self._stop({package})

    async def _go_by(self, book: Deployments, wait: bool = True) -> None:
        """Make a book the one that holds: write it, wait until the gateway goes by it, stop what it leaves out."""
        await self._write(book)
        await self._tell(wait)
        await self._stop(set(self._used) - {version.package for version in book.live})

    async def _write(self, book: Deployments) -> None:
        await asyncio.to_thread(write_deployments, self._uri, book)
        self._book = book

    async def _tell(self, wait: bool = True) -> None:
        async with self._changed:
            self._number += 1
            number = self._number
            self._changed.notify_all()
            if wait:
                with contextlib.suppress(TimeoutError):  # a gateway that is being replaced asks when it is there
                    async with asyncio.timeout(HEARD_S):
                        await self._changed.wait_for(lambda: self._heard >= number)

    async def _stop(self, packages: set[str]) -> None:
        if packages:
            for package in packages:
                del self._used[package]
                self._fleet.take(package)
            await self._tell()
            await asyncio.sleep(GRACE_S)
        for package in packages:
            stop = partial(serve.delete, application_name(package), _blocking=False)
            await asyncio.to_thread(stop)  # streams may take their time


def describe_version(where: str, settings: Serve) -> Version:
    """A package, verified, as a version.

    Raises:
        InputError: it may not be served.
    """
    where = resolve_package(where)
    package = open_package(fetch_package(where))
    measured = package.measured.metrics.get("resident_mb")
    resident = package.size_bytes / 1e6 if measured is None else measured.value
    resident += package.drafting["draft"].stat().st_size / 1e6 if package.drafting else 0.0
    return Version(model=model_info(package), where=where, settings=settings, resident_mb=resident)


def _run(version: Version, count: int) -> None:
    start_application(replica_application(version, count), version.application)
    wait_until_running(version.application)
