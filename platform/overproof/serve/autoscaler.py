"""Replicas of the versions that are loaded, as many as the load of each asks for."""

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


class Autoscaler:
    """The versions whose replicas follow their load: not those that are being started or stopped."""

    def __init__(self) -> None:
        self._scales: dict[str, ReplicaTarget] = {}

    def put(self, version: Version, replicas: int) -> None:
        """Let a version follow its load, from as many replicas as it has."""
        self._scales[version.package] = ReplicaTarget(version.settings, replicas)

    def take(self, package: str) -> int:
        """Leave a version alone; gives how many replicas it should have now, none where it followed nothing."""
        scale = self._scales.pop(package, None)
        return 0 if scale is None else scale.replicas

    def see(self, version: Version, requests: int, now_s: float) -> None:
        """Take in the requests that a version has now, and have it keep the replicas that they ask for."""
        scale = self._scales.get(version.package)
        if scale is None:
            return
        before = scale.replicas
        if scale.see(requests, now_s) != before:
            LOG.info("%s: %d to %d replicas", version.package, before, scale.replicas)
            log_failure(asyncio.ensure_future(self._resize(version, scale, before)))

    async def _resize(self, version: Version, scale: ReplicaTarget, before: int) -> None:
        try:
            await asyncio.to_thread(set_replicas, version.application, scale.replicas)
        except BaseException:
            scale.replicas = before  # and asked for again, if it is still wanted
            raise


def log_failure(task: asyncio.Future[Any]) -> None:
    """Have a failure of a task that nobody waits for in the log."""

    def log(done: asyncio.Future[Any]) -> None:
        if not done.cancelled() and done.exception() is not None:
            LOG.error("a change that the desk began failed", exc_info=done.exception())

    task.add_done_callback(log)


LOOK_BACK_S = 2.0  # over which the load is averaged
TOLERANCE = 0.1  # as in Kubernetes' HPA: load that is this close to what the replicas are for moves nothing


def clamp_replicas(settings: Serve, replicas: int) -> int:
    """As many as are asked for, or the nearest number that the settings allow."""
    return min(max(replicas, settings.min_replicas), settings.max_replicas)


class ReplicaTarget:
    """Follows the load of one version: up after ``upscale_delay_s`` of more than ``slots`` requests a replica, down
    after ``downscale_delay_s`` of fewer, then to the most that was wanted meanwhile. From none it is up at once.
    """

    def __init__(self, settings: Serve, replicas: int) -> None:
        self.replicas = clamp_replicas(settings, replicas)
        self._settings = settings
        self._seen: deque[tuple[float, float]] = deque()  # time, load
        self._above_s: float | None = None  # since when more replicas are wanted
        self._below: deque[tuple[float, int]] = deque()  # time, replicas wanted, since fewer are

    def see(self, requests: float, now_s: float) -> int:
        """Take in how many requests are being answered or wait now; gives the replicas there should be."""
        self._seen.append((now_s, requests))
        while self._seen[0][0] < now_s - LOOK_BACK_S:
            self._seen.popleft()
        wanted = self._wanted(requests)
        if wanted > self.replicas:
            self._below.clear()
            if self._above_s is None:
                self._above_s = now_s
            if self.replicas == 0 or now_s - self._above_s >= self._settings.upscale_delay_s:
                self.replicas, self._above_s = wanted, None
            return self.replicas
        self._above_s = None
        if wanted == self.replicas:
            self._below.clear()
            return self.replicas
        self._below.append((now_s, wanted))
        if now_s - self._below[0][0] >= self._settings.downscale_delay_s:
            self.replicas = max(each for _, each in self._below)
            self._below.clear()
        return self.replicas

    def _wanted(self, requests: float) -> int:
        slots, now = self._settings.slots, self.replicas
        mean = sum(load for _, load in self._seen) / len(self._seen)
        if now == 0:
            mean = requests
        wanted = ceil(mean / slots)
        if now and abs(mean / (slots * now) - 1) <= TOLERANCE:
            wanted = now
        return clamp_replicas(self._settings, wanted)
