"""The Ray Serve deployment of one package: replicas that each verify and load it, and then work for the gateway."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import ray
from ray import serve
from ray.serve import Application

from overproof.config import Serve
from overproof.engines import text_engine
from overproof.engines.base import Sampling, TextEngine
from overproof.engines.onnx_runtime import OnnxClassifier
from overproof.errors import InputError
from overproof.package.package import Package, fetch_package, open_package
from overproof.serve.async_engine import BatchingClassifier, ThreadedEngine
from overproof.serve.deployments import CONTROLLER_NAME, Version
from overproof.serve.ray_serve import MODEL_DEPLOYMENT
from overproof.serve.replica_worker import ReplicaWorker
from overproof.serve.rpc import GatewayAddress

REQUESTS_PER_SLOT = {"text": 1, "digits": 16}  # sent to a replica at once; images of several share a batch
THREADS_PER_SLOT = 2  # of the engine, so that requests that need no slot do not wait for one
SURGE_PERCENT = 100  # an update starts a new replica for each before it stops an old one
HEALTH_PERIOD_S, HEALTH_TIMEOUT_S = 10, 30
DRAIN_TIMEOUT_S = 300  # so that open streams are finished


def replica_application(version: Version, count: int) -> Application:
    """The Serve application of a version, with so many replicas to begin with."""
    settings = version.settings
    deployment = ModelReplica.options(  # type: ignore[attr-defined]
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
    bound: Application = deployment.bind(version.location, version.package, settings)
    return bound


@serve.deployment(name=MODEL_DEPLOYMENT)
class ModelReplica:
    """One package and its engine. Ray Serve places and replaces it; its requests come from the gateway."""

    async def __init__(self, location: str, id_: str, settings: Serve) -> None:  # type: ignore[misc]
        package = open_package(fetch_package(location))
        if package.content.id != id_:  # a folder of packages may have a newer one
            raise InputError(f"{location}: found {package.content.id}; expected {id_}")
        engine = load_engine(package, settings)
        # A replica counts as started once its model has answered.
        if isinstance(engine, OnnxClassifier):
            self._engine: ThreadedEngine = BatchingClassifier(engine, engine.pixels)
            await self._engine.classify(np.zeros((1, engine.pixels), np.float32))
        else:
            self._engine = ThreadedEngine(engine, THREADS_PER_SLOT * settings.slots)
            await self._engine.complete(" ", Sampling(1))
        capacity = REQUESTS_PER_SLOT[package.content.kind] * settings.slots
        self._worker = ReplicaWorker(self._engine, id_, capacity, gateway_address)

    async def check_health(self) -> None:
        """Called by Ray Serve now and then; after an error it replaces the replica."""
        await self._engine.check()

    async def __del__(self) -> None:
        """Called by Ray Serve when the replica is to stop."""
        await self._worker.drain()
        await self._engine.close()


async def gateway_address(known: GatewayAddress | None) -> GatewayAddress | None:
    """Where the gateway takes connections, from the controller; a long poll that ends when it is not the known one."""
    controller: Any = await asyncio.to_thread(ray.get_actor, CONTROLLER_NAME, CONTROLLER_NAME)
    address: GatewayAddress | None = await controller.gateway_address.remote(known)
    return address


def load_engine(package: Package, settings: Serve) -> TextEngine | OnnxClassifier:
    """The engine that the package was measured with, its model loaded."""
    if package.content.kind == "text":
        return text_engine(
            package.report.engine or "llama.cpp",
            package.model,
            threads=settings.threads,
            slots=settings.slots,
            reuse_prefix=True,
            max_prompt_tokens=settings.max_prompt_tokens,
            **package.drafting,
        )
    return OnnxClassifier(package.model, settings.threads)
