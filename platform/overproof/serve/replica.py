"""The Serve deployment of one package: replicas that each verify and load it, and then work for the gateway."""

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
from overproof.serve.deployments import CONTROLLER, Version
from overproof.serve.replica_worker import ReplicaWorker
from overproof.serve.rpc import GatewayAddress

ROOM_PER_SLOT = {"text": 1, "digits": 16}  # requests a replica is given at once: a batch of images is made of many
CALLS_PER_SLOT = 2  # engine threads for what takes no room, too
SURGE_PERCENT = 100  # an update starts a new replica for each before it stops an old one
HEALTH_PERIOD_S, HEALTH_TIMEOUT_S = 10, 30
DRAIN_S = 300  # a stream that goes on is finished


def replica_application(version: Version, count: int) -> Application:
    """The Serve application of a version; the desk says later how many replicas it has."""
    settings = version.settings
    deployment = ModelReplica.options(  # type: ignore[attr-defined]
        num_replicas=count,
        max_surge_percent=SURGE_PERCENT,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        graceful_shutdown_timeout_s=DRAIN_S,
        graceful_shutdown_wait_loop_s=0.1,
        ray_actor_options={
            "num_cpus": settings.cpus_per_replica,
            "num_gpus": settings.gpus_per_replica,
            **({"label_selector": settings.node_labels} if settings.node_labels else {}),
        },
    )
    bound: Application = deployment.bind(version.where, version.package, settings)
    return bound


@serve.deployment(name="model")
class ModelReplica:
    """One package. Ray Serve places it and looks after it; its work it gets from the gateway."""

    async def __init__(self, where: str, id_: str, settings: Serve) -> None:  # type: ignore[misc]
        package = open_package(fetch_package(where))
        if package.content.id != id_:  # a folder of packages may have a newer one
            raise InputError(f"{where}: found {package.content.id}; expected {id_}")
        engine = load_engine(package, settings)
        calls = CALLS_PER_SLOT * settings.slots
        # A replica is there when its model has answered.
        if isinstance(engine, OnnxClassifier):
            self._backend: ThreadedEngine = BatchingClassifier(engine, engine.pixels)
            await self._backend.classify(np.zeros((1, engine.pixels), np.float32))
        else:
            self._backend = ThreadedEngine(engine, calls)
            await self._backend.complete(" ", Sampling(1))
        self._post = ReplicaWorker(
            self._backend, id_, ROOM_PER_SLOT[package.content.kind] * settings.slots, gateway_address
        )

    async def check_health(self) -> None:
        """What Ray Serve calls now and then; an error has the replica replaced."""
        await self._backend.check()

    async def __del__(self) -> None:
        """What Ray Serve calls when a replica is to stop."""
        await self._post.leave()
        await self._backend.close()


async def gateway_address(seen: GatewayAddress | None) -> GatewayAddress | None:
    """Where the gateway takes calls of replicas, as the desk has it."""
    desk: Any = await asyncio.to_thread(ray.get_actor, CONTROLLER, CONTROLLER)
    found: GatewayAddress | None = await desk.door.remote(seen)
    return found


def load_engine(package: Package, settings: Serve) -> TextEngine | OnnxClassifier:
    """The engine that the package was measured with, and its model loaded."""
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
