"""Replicas follow the load: how many a version should have, and the loop that has Ray Serve keep so many."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from math import ceil
from typing import Any

from overproof.config import Serve
from overproof.serve.deployments import Version
from overproof.serve.ray_serve import set_replicas

LOG = logging.getLogger("ray.serve")
WINDOW_S = 2.0  # over which the load is averaged
TOLERANCE = 0.1  # as in Kubernetes' HPA: load within a tenth of what the replicas are for changes nothing


class Autoscaler:
    """Resizes the versions that it tracks; a version that is being started or stopped is not tracked."""

    def __init__(self) -> None:
        self._targets: dict[str, ReplicaTarget] = {}  # by package

    def track(self, version: Version, replicas: int) -> None:
        """Have a version follow its load, from as many replicas as it has."""
        self._targets[version.package] = ReplicaTarget(version.settings, replicas)

    def target(self, package: str) -> int:
        """Replicas that a version should have now, 0 where it is not tracked."""
        target = self._targets.get(package)
        return 0 if target is None else target.replicas

    def untrack(self, package: str) -> int:
        """Resize a version no longer; gives its target, 0 where it was not tracked."""
        replicas = self.target(package)
        self._targets.pop(package, None)
        return replicas

    def observe(self, version: Version, requests: int, now_s: float) -> None:
        """Take in how many requests a version has now, and resize it where the load asks for it."""
        target = self._targets.get(version.package)
        if target is None:
            return
        previous = target.replicas
        if target.observe(requests, now_s) != previous:
            LOG.info("%s: %d to %d replicas", version.package, previous, target.replicas)
            log_failure(asyncio.ensure_future(self._resize(version, target, previous)))

    async def _resize(self, version: Version, target: ReplicaTarget, previous: int) -> None:
        try:
            await asyncio.to_thread(set_replicas, version.application, target.replicas)
        except BaseException:
            target.replicas = previous  # the next observation tries again, if it is still wanted
            raise


class ReplicaTarget:
    """The number of replicas that one version should have: up after ``upscale_delay_s`` of more than ``slots`` requests
    a replica, down after ``downscale_delay_s`` of fewer, then to the most that was wanted meanwhile. From 0 it is up at
    once.
    """

    def __init__(self, settings: Serve, replicas: int) -> None:
        self.replicas = clamp_replicas(settings, replicas)
        self._settings = settings
        self._samples: deque[tuple[float, float]] = deque()  # time, requests
        self._above_since_s: float | None = None  # more replicas are wanted since then
        self._below: deque[tuple[float, int]] = deque()  # time, replicas wanted, since fewer are

    def observe(self, requests: float, now_s: float) -> int:
        """Take in how many requests run or wait now; gives the number of replicas there should be."""
        self._samples.append((now_s, requests))
        while self._samples[0][0] < now_s - WINDOW_S:
            self._samples.popleft()
        wanted = self._wanted(requests)
        if wanted > self.replicas:
            self._below.clear()
            if self._above_since_s is None:
                self._above_since_s = now_s
            if self.replicas == 0 or now_s - self._above_since_s >= self._settings.upscale_delay_s:
                self.replicas, self._above_since_s = wanted, None
            return self.replicas
        self._above_since_s = None
        if wanted == self.replicas:
            self._below.clear()
            return self.replicas
        self._below.append((now_s, wanted))
        if now_s - self._below[0][0] >= self._settings.downscale_delay_s:
            self.replicas = max(replicas for _, replicas in self._below)
            self._below.clear()
        return self.replicas

    def _wanted(self, requests: float) -> int:
        slots = self._settings.slots
        if self.replicas == 0:
            return clamp_replicas(self._settings, ceil(requests / slots))
        mean = sum(load for _, load in self._samples) / len(self._samples)
        if abs(mean / (slots * self.replicas) - 1) <= TOLERANCE:
            return clamp_replicas(self._settings, self.replicas)
        return clamp_replicas(self._settings, ceil(mean / slots))


def clamp_replicas(settings: Serve, replicas: int) -> int:
    """As many as asked for, or the nearest number that the settings allow."""
    return min(max(replicas, settings.min_replicas), settings.max_replicas)


def log_failure(task: asyncio.Future[Any]) -> None:
    """Have a failure of a background task in the log; nobody awaits it."""

    def log(finished: asyncio.Future[Any]) -> None:
        if not finished.cancelled() and finished.exception() is not None:
            LOG.error("a background change failed", exc_info=finished.exception())

    task.add_done_callback(log)
