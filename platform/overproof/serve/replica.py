"""The Ray Serve deployment of one package: replicas that each verify and load it, and then work for the gateway."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from typing import Any

import numpy as np

from overproof.config import Serve
from overproof.engines.base import ArrayEngine, EngineSettings, Sampling, TextEngine
from overproof.package.package import Package, load_package
from overproof.registry import ENGINES
from overproof.serve.async_engine import BatchingEngine, ThreadedEngine
from overproof.serve.deployments import CONTROLLER_NAME, Version
from overproof.serve.package_trust import trust_policy
from overproof.serve.ray_serve import MODEL_DEPLOYMENT, Application, find_actor, listen_on_loopback, make_application
from overproof.serve.replica_worker import ReplicaWorker
from overproof.serve.rpc import SMALL_AT_ONCE, GatewayAddress

LOG = logging.getLogger("ray.serve")
BATCHED_REQUESTS_PER_SLOT = 16  # sent at once to a replica that puts rows of several into one batch
SURGE_PERCENT = 100  # an update starts a new replica for each before it stops an old one
HEALTH_PERIOD_S, HEALTH_TIMEOUT_S = 10, 30
DRAIN_TIMEOUT_S = 300  # so that open streams are finished


def replica_application(version: Version, count: int) -> Application:
    """The Serve application of a version, with so many replicas to begin with."""
    settings = version.settings
    return make_application(
        ModelReplica,
        MODEL_DEPLOYMENT,
        version.location,
        version.contents_sha256,
        settings,
        num_replicas=count,
        max_surge_percent=SURGE_PERCENT,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        graceful_shutdown_timeout_s=DRAIN_TIMEOUT_S,
        graceful_shutdown_wait_loop_s=0.1,
        ray_actor_options={
            "num_cpus": settings.cpus_per_replica,
            "num_gpus": settings.gpus_per_replica,
            **({"label_selector": settings.node_labels} if settings.node_labels else {}),
        },
    )


class ModelReplica:
    """One package and its engine. Ray Serve places and replaces it; its requests come from the gateway."""

    async def __init__(self, location: str, contents_sha256: str, settings: Serve) -> None:  # type: ignore[misc]
        listen_on_loopback()
        # Kept: engines read its files later, too.
        self._package = load_package(location, trust_policy(settings), contents_sha256, LOG.info)
        engine = load_engine(self._package, settings)
        # A replica counts as started once its model has answered.
        capacity = settings.slots
        if isinstance(engine, ArrayEngine):
            self._engine: ThreadedEngine = BatchingEngine(engine)
            await self._engine.logprobs(np.zeros((1, engine.width), np.float32))
            capacity *= BATCHED_REQUESTS_PER_SLOT
        else:
            self._engine = ThreadedEngine(engine, settings.slots + SMALL_AT_ONCE)
            await self._engine.complete(" ", Sampling(1))
        self._worker = ReplicaWorker(self._engine, self._package.content.id, capacity, gateways)

    async def check_health(self) -> None:
        """Called by Ray Serve now and then; after an error it replaces the replica."""
        await self._engine.check()

    async def __del__(self) -> None:
        """Called by Ray Serve when the replica is to stop."""
        await self._worker.drain()
        await self._engine.close()


async def gateways(known: frozenset[GatewayAddress]) -> frozenset[GatewayAddress]:
    """Where gateways take connections, from the controller; a long poll that ends when these are not the known ones."""
    controller: Any = await asyncio.to_thread(find_actor, CONTROLLER_NAME)
    addresses: frozenset[GatewayAddress] = await controller.gateways.remote(known)
    return addresses


def load_engine(package: Package, settings: Serve) -> TextEngine | ArrayEngine:
    """The engine that the package was measured with, its model loaded.

    Raises:
        InputError: that engine is not installed here, or cannot load the file.
    """
    loader = ENGINES[package.report.engine]
    loader.require()
    loaded_with = EngineSettings(
        threads=settings.threads,
        kv_cache=package.report.kv_cache,
        slots=settings.slots,
        reuse_prefix=True,
        max_prompt_tokens=settings.max_prompt_tokens,
    )
    if package.draft:
        draft, draft_tokens = package.draft
        loaded_with = replace(loaded_with, draft=draft, draft_tokens=draft_tokens)
    return loader.load(package.model, loaded_with)
