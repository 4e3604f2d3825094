"""A package's replicas, asked through Ray Serve: it finds a free one, queues, and tells the autoscaler."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from overproof.serve.backend import Busy, Prompt, Whole
from overproof.serve.engines.base import Piece, Sampling

TRIES = 4  # of a request that no part of an answer was sent of, when its replica dies
PAUSE_S = 0.2
GONE = (ActorDiedError, ActorUnavailableError, ReplicaUnavailableError)


class Replicas:
    """A ``Backend`` of replicas that other processes hold."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle
        self._streaming = handle.options(stream=True)

    async def complete(self, prompt: Prompt, sampling: Sampling) -> Whole:
        done: Whole = await self._ask("complete", prompt, sampling)
        return done

    async def accept(self, prompt: Prompt, sampling: Sampling) -> None:
        await self._ask("accept", prompt, sampling)

    async def stream(self, prompt: Prompt, sampling: Sampling) -> AsyncGenerator[Piece]:
        for attempt in range(TRIES):
            begun = False
            response: Any = None
            try:
                with explained():
                    response = self._streaming.stream.remote(prompt, sampling)
                    async for piece in response:
                        begun = True
                        yield piece
                return
            except GONE:
                if begun or attempt == TRIES - 1:
                    raise
                await asyncio.sleep(PAUSE_S)
            finally:
                if response is not None:
                    response.cancel()  # nothing, where it has ended

    async def chat_prompt(self, messages: Sequence[Mapping[str, str]]) -> str:
        prompt: str = await self._ask("chat_prompt", messages)
        return prompt

    async def detokenize(self, ids: Sequence[int]) -> str:
        text: str = await self._ask("detokenize", ids)
        return text

    async def classify(self, pixels_BD: NDArray[np.float32]) -> NDArray[np.float32]:
        logprobs_BC: NDArray[np.float32] = await self._ask("classify", pixels_BD)
        return logprobs_BC

    async def check(self) -> None:
        await self._ask("check")

    async def _ask(self, method: str, *args: Any) -> Any:
        for attempt in range(TRIES):
            try:
                with explained():
                    return await getattr(self._handle, method).remote(*args)
            except GONE:
                if attempt == TRIES - 1:
                    raise
                await asyncio.sleep(PAUSE_S)
        raise AssertionError


@contextmanager
def explained() -> Iterator[None]:
    """What went wrong in a replica or an actor, as if it had gone wrong here."""
    try:
        yield
    except RayTaskError as error:
        raise error.cause from None
    except (BackPressureError, DeploymentUnavailableError) as error:
        raise Busy(str(error)) from None
