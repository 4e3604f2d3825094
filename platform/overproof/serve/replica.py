"""The Serve deployment of one package: replicas that each verify and load it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing

import numpy as np
from numpy.typing import NDArray
from ray import serve
from ray.serve import Application

from overproof.errors import InputError
from overproof.recipe import Serve
from overproof.registry.package import Package, locate, open_package
from overproof.serve.backend import Prompt, Threads, Whole
from overproof.serve.book import Version
from overproof.serve.engines.base import Piece, Sampling
from overproof.serve.engines.llamacpp import LlamaCpp
from overproof.serve.engines.onnx import OnnxClassifier

ONGOING_PER_SLOT = {"text": 4, "digits": 16}  # requests a replica holds: the others wait in the engine
QUEUED_PER_SLOT = 16  # requests that wait outside before more are refused
LOOK_BACK_S, METRICS_S = 2.0, 0.5  # of the load that replicas are added for
SURGE_PERCENT = 100  # an update starts a new replica for each before it stops an old one
HEALTH_PERIOD_S, HEALTH_TIMEOUT_S = 10, 30
DRAIN_S = 300  # a stream that goes on is finished
MOST_TOGETHER = 64  # requests whose images are classified at once


def replicas(version: Version) -> Application:
    """The Serve application of a version."""
    settings = version.settings
    ongoing = ONGOING_PER_SLOT[version.model.overproof.kind] * settings.slots
    deployment = Replica.options(  # type: ignore[attr-defined]
        autoscaling_config={
            "min_replicas": settings.min_replicas,
            "max_replicas": settings.max_replicas,
            "target_ongoing_requests": settings.slots,
            "upscale_delay_s": settings.upscale_delay_s,
            "downscale_delay_s": settings.downscale_delay_s,
            "look_back_period_s": LOOK_BACK_S,
            "metrics_interval_s": METRICS_S,
        },
        max_surge_percent=SURGE_PERCENT,
        max_ongoing_requests=ongoing,
        max_queued_requests=QUEUED_PER_SLOT * settings.slots,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        graceful_shutdown_timeout_s=DRAIN_S,
        graceful_shutdown_wait_loop_s=0.5,
        ray_actor_options={
            "num_cpus": settings.cpus_per_replica,
            **({"label_selector": settings.node_labels} if settings.node_labels else {}),
        },
    )
    bound: Application = deployment.bind(version.where, version.package, settings, ongoing)
    return bound


@serve.deployment(name="model")
class Replica:
    """One package; the methods are those of ``Backend``."""

    async def __init__(  # type: ignore[misc]
        self, where: str, id_: str, settings: Serve, calls: int
    ) -> None:
        package = open_package(locate(where))
        if package.content.id != id_:  # a folder of packages may have a newer one
            raise InputError(f"{where}: found {package.content.id}; expected {id_}")
        engine = load_engine(package, settings)
        self._backend = Threads(engine, calls)
        self._pixels = 0
        # A replica is there when its model has answered.
        if isinstance(engine, OnnxClassifier):
            self._pixels = engine.pixels
            await self._backend.classify(np.zeros((1, engine.pixels), np.float32))
        else:
            await self._backend.complete(" ", Sampling(1))

    async def complete(self, prompt: Prompt, sampling: Sampling) -> Whole:
        return await self._backend.complete(prompt, sampling)

    async def accept(self, prompt: Prompt, sampling: Sampling) -> None:
        await self._backend.accept(prompt, sampling)

    async def stream(self, prompt: Prompt, sampling: Sampling) -> AsyncGenerator[Piece]:
        async with aclosing(self._backend.stream(prompt, sampling)) as pieces:
            async for piece in pieces:
                yield piece

    async def chat_prompt(self, messages: Sequence[Mapping[str, str]]) -> str:
        return await self._backend.chat_prompt(messages)

    async def detokenize(self, ids: Sequence[int]) -> str:
        return await self._backend.detokenize(ids)

    async def classify(self, pixels_BD: NDArray[np.float32]) -> NDArray[np.float32]:
        if pixels_BD.shape[1] != self._pixels:
            return await self._backend.classify(pixels_BD)  # which says what is wrong, of this request alone
        logprobs_BC: NDArray[np.float32] = await self._classify_together(pixels_BD)
        return logprobs_BC

    @serve.batch(max_batch_size=MOST_TOGETHER, batch_wait_timeout_s=0)
    async def _classify_together(self, several: list[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
        """What came in while the batch before was classified."""
        ends = np.cumsum([len(pixels_BD) for pixels_BD in several])
        return np.split(await self._backend.classify(np.concatenate(several)), ends[:-1])

    async def check(self) -> None:
        await self._backend.check()

    async def check_health(self) -> None:
        """What Ray Serve calls now and then; an error has the replica replaced."""
        await self._backend.check()

    async def __del__(self) -> None:
        """What Ray Serve calls when a replica has no request left."""
        await self._backend.close()


def load_engine(package: Package, settings: Serve) -> LlamaCpp | OnnxClassifier:
    """The engine for the package's kind, with its model loaded."""
    if package.content.kind == "text":
        return LlamaCpp(
            package.model,
            settings.threads,
            settings.slots,
            reuse_prefix=True,
            max_prompt_tokens=settings.max_prompt_tokens,
            **package.drafting,
        )
    return OnnxClassifier(package.model, settings.threads)
