"""Replicas of the versions that are loaded, as many as the load of each asks for."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from overproof.serve.applications import rescale
from overproof.serve.book import Version
from overproof.serve.scale import Scale

LOG = logging.getLogger("ray.serve")


class Fleet:
    """The versions whose replicas follow their load: not those that are being started or stopped."""

    def __init__(self) -> None:
        self._scales: dict[str, Scale] = {}

    def put(self, version: Version, replicas: int) -> None:
        """Let a version follow its load, from as many replicas as it has."""
        self._scales[version.package] = Scale(version.settings, replicas)

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
            logged(asyncio.ensure_future(self._resize(version, scale, before)))

    async def _resize(self, version: Version, scale: Scale, before: int) -> None:
        try:
            await asyncio.to_thread(rescale, version.application, scale.replicas)
        except BaseException:
            scale.replicas = before  # and asked for again, if it is still wanted
            raise


def logged(task: asyncio.Future[Any]) -> None:
    """Have a failure of a task that nobody waits for in the log."""

    def log(done: asyncio.Future[Any]) -> None:
        if not done.cancelled() and done.exception() is not None:
            LOG.error("a change that the desk began failed", exc_info=done.exception())

    task.add_done_callback(log)
