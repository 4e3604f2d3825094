"""How many replicas the load asks for. Plain arithmetic, for which time is an argument."""

from __future__ import annotations

from collections import deque
from math import ceil

from overproof.recipe import Serve

LOOK_BACK_S = 2.0  # over which the load is averaged
TOLERANCE = 0.1  # as in Kubernetes' HPA: load that is this close to what the replicas are for moves nothing


def within(settings: Serve, replicas: int) -> int:
    """As many as are asked for, or the nearest number that the settings allow."""
    return min(max(replicas, settings.min_replicas), settings.max_replicas)


class Scale:
    """Follows the load of one version: up after ``upscale_delay_s`` of more than ``slots`` requests a replica, down
    after ``downscale_delay_s`` of fewer, then to the most that was wanted meanwhile. From none it is up at once.
    """

    def __init__(self, settings: Serve, replicas: int) -> None:
        self.replicas = within(settings, replicas)
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
        return within(self._settings, wanted)
