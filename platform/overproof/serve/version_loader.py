"""Which versions have replicas: starts and stops them, and evicts the least recently used where memory is short.

Packages load beside each other, so that one that does not come up holds up no other.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping

from overproof.config import Serve
from overproof.errors import InputError
from overproof.serve import ray_serve
from overproof.serve.autoscaler import Autoscaler, clamp_replicas
from overproof.serve.deployments import Version, application_name
from overproof.serve.replica import replica_application

GRACE_S = 0.5  # for requests that have found a version and are not sent to it yet


class VersionLoader:
    """``on_stop`` is awaited when packages are to get no more requests, before their replicas stop."""

    def __init__(self, on_stop: Callable[[], Awaitable[None]]) -> None:
        self.autoscaler = Autoscaler()
        self.memory_mb: float | None = None
        self.server: Serve | None = None  # whose trust decides what replicas load
        self._on_stop = on_stop
        self._loaded: dict[str, Version] = {}  # by package
        self._last_used_s: dict[str, float] = {}
        self._starting: dict[str, Version] = {}
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)  # by package
        self._changed = asyncio.Condition()

    @property
    def loaded(self) -> frozenset[str]:
        """Packages that have replicas, or get them without being loaded again."""
        return frozenset(self._loaded)

    @property
    def busy(self) -> bool:
        """Whether versions are being started."""
        return bool(self._starting)

    def adopt(self, versions: Iterable[Version], present: Mapping[str, int]) -> None:
        """Take the replicas that are there, by the name of their application, for these versions', and no others."""
        for package in set(self._loaded) - set(self._starting):
            del self._loaded[package], self._last_used_s[package]
            self.autoscaler.untrack(package)
        for version in versions:
            if version.application in present and version.package not in self._starting:
                self._loaded[version.package] = version
                self._last_used_s[version.package] = time.monotonic()
                self.autoscaler.track(version, present[version.application])

    def touch(self, packages: Iterable[str]) -> None:
        """Packages that are in use now."""
        self._last_used_s |= {package: time.monotonic() for package in packages if package in self._loaded}

    async def start(self, version: Version, replicas: int = 0, patience_s: float | None = None) -> bool:
        """Have so many replicas of a version run, or the nearest number that its settings allow; those of its package
        with other settings are replaced. After ``patience_s``, if given, one is enough, and the others come when there
        is room. Gives whether the version was started.

        Raises:
            InputError: it does not start, or not all of it; what ran before goes on.
        """
        async with self._locks[version.package]:
            running = self._loaded.get(version.package)
            wanted = clamp_replicas(version.settings, replicas)
            if running == version and wanted <= self.autoscaler.target(version.package):
                return False
            await self._make_room(version)
            running_count = self.autoscaler.untrack(version.package)
            tracked = None if running is None else (running, running_count)
            count = clamp_replicas(version.settings, max(wanted, running_count, 1))
            try:
                if running == version:
                    await asyncio.to_thread(_resize, version, count, patience_s)
                else:
                    await asyncio.to_thread(_run_replicas, self._trusting(version), count, patience_s)
                tracked = version, count
            except RuntimeError as error:
                if running == version:
                    await asyncio.to_thread(ray_serve.set_replicas, version.application, running_count)
                elif tracked is not None:
                    await asyncio.to_thread(_run_replicas, self._trusting(tracked[0]), tracked[1])
                else:
                    await asyncio.to_thread(ray_serve.abandon_application, version.application)
                raise InputError(f"{version.package} does not start, and nothing has changed: {error}") from None
            finally:
                if tracked is not None:
                    self.autoscaler.track(*tracked)
                    self._loaded[version.package] = tracked[0]
                    self._last_used_s[version.package] = time.monotonic()
                async with self._changed:
                    del self._starting[version.package]
                    self._changed.notify_all()
            return running != version

    async def stop(self, packages: set[str]) -> None:
        """Stop what is loaded of these packages, once requests go elsewhere."""
        packages = packages & set(self._loaded)
        if not packages:
            return
        for package in packages:
            del self._loaded[package], self._last_used_s[package]
            self.autoscaler.untrack(package)
        await self._on_stop()
        await asyncio.sleep(GRACE_S)
        for package in packages - set(self._starting):  # without a wait: their streams may go on for minutes
            await asyncio.to_thread(ray_serve.delete_application, application_name(package), wait=False)

    async def give_up(self, model: str) -> str | None:
        """End the start of a version of this model of which nothing has run; gives its package, where there is one."""
        found = None
        for package, version in list(self._starting.items()):
            if version.model.id == model and package not in self._loaded:
                await asyncio.to_thread(ray_serve.abandon_application, version.application)
                found = package
        return found

    async def _make_room(self, version: Version) -> None:
        """Stop the versions that were least recently used until this one fits into ``memory_mb``, and reserve its part.

        Raises:
            InputError: it does not fit, whatever is stopped.
        """
        if self.memory_mb is not None and version.resident_mb > self.memory_mb:
            raise InputError(
                f"serve.memory_mb: {version.package} takes {version.resident_mb:.0f} MB; expected "
                f"{self.memory_mb:.0f} at most"
            )
        while not self._fits(version):
            idle = [package for package in self._loaded if package not in self._starting and package != version.package]
            if idle:
                await self.stop({min(idle, key=self._last_used_s.__getitem__)})
            else:  # others are being started: one of them may be stopped when it has
                async with self._changed:
                    await self._changed.wait()
        self._starting[version.package] = version

    def _trusting(self, version: Version) -> Version:
        """With the server's trust: what a version was deployed with lies in a file that others may write to."""
        if self.server is None:
            return version
        own = {"host": self.server.host, "trust": self.server.trust}
        return version.model_copy(update={"settings": version.settings.model_copy(update=own)})

    def _fits(self, version: Version) -> bool:
        others = {**self._loaded, **self._starting}
        others.pop(version.package, None)
        used_mb = sum(other.resident_mb for other in others.values())
        return self.memory_mb is None or used_mb + version.resident_mb <= self.memory_mb


def _run_replicas(version: Version, count: int, patience_s: float | None = None) -> None:
    ray_serve.start_application(replica_application(version, count), version.application)
    ray_serve.wait_until_running(version.application, count, patience_s)


def _resize(version: Version, count: int, patience_s: float | None) -> None:
    ray_serve.set_replicas(version.application, count)
    ray_serve.wait_until_running(version.application, count, patience_s)
