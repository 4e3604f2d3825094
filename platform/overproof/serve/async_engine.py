"""An engine as the HTTP API asks it: from an event loop, and wherever it runs.

Shapes: B images in a batch, D pixels, C classes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from overproof.engines.base import (
    ClassifierEngine,
    Completion,
    FinishReason,
    Piece,
    Pieces,
    Sampling,
    TextEngine,
)

ResultT = TypeVar("ResultT")
Prompt = str | Sequence[int]
Waiting = tuple[NDArray[np.float32], asyncio.Future[NDArray[np.float32]]]
MOST_TOGETHER = 16  # requests classified at once: a core gains little beyond, and meanwhile others come and go


class Busy(Exception):
    """No replica can take one more request now."""


@dataclass(frozen=True)
class Generation:
    """What came of a prompt."""

    text: str
    finish_reason: FinishReason | None
    prompt_tokens: int
    completion_tokens: int
    done: Completion | None = None  # where log-probabilities were asked for


class AsyncEngine(Protocol):
    """What ``TextEngine`` and ``ClassifierEngine`` do; each raises as they do, or ``Busy``."""

    async def complete(self, prompt: Prompt, sampling: Sampling) -> Generation:
        """Continue a prompt until done; generation ends with the task that waits for it."""

    async def accept(self, prompt: Prompt, sampling: Sampling) -> None:
        """Return where ``complete`` would begin."""

    def stream(self, prompt: Prompt, sampling: Sampling) -> AsyncGenerator[Piece]:
        """Continue a prompt piece by piece; generation ends when the generator is closed."""

    async def chat_prompt(self, messages: Sequence[Mapping[str, str]]) -> str: ...

    async def detokenize(self, ids: Sequence[int]) -> str: ...

    async def classify(self, pixels_BD: NDArray[np.float32]) -> NDArray[np.float32]: ...

    async def check(self) -> None:
        """Return when the engine answers, raise when it does not."""


class ThreadedEngine:
    """An engine of this process, called from ``calls`` threads at most; more calls wait."""

    def __init__(self, engine: TextEngine | ClassifierEngine, calls: int) -> None:
        self._engine: Any = engine
        self._pool = ThreadPoolExecutor(calls, thread_name_prefix="engine")

    async def _call(self, function: Callable[[], ResultT]) -> ResultT:
        return await asyncio.get_running_loop().run_in_executor(self._pool, function)

    async def complete(self, prompt: Prompt, sampling: Sampling) -> Generation:
        if sampling.logprobs is not None:  # llama.cpp streams none, and cannot be called back
            done: Completion = await self._call(partial(self._engine.complete, prompt, sampling))
            return Generation(done.text, done.finish_reason, done.prompt_tokens, len(done.tokens), done)
        async with self._begun(prompt, sampling) as pieces:
            return await self._call(partial(_joined, pieces))

    async def accept(self, prompt: Prompt, sampling: Sampling) -> None:
        await self._call(partial(self._engine.accept, prompt, sampling))

    async def stream(self, prompt: Prompt, sampling: Sampling) -> AsyncGenerator[Piece]:
        loop, come = asyncio.get_running_loop(), asyncio.Queue[Piece | None]()
        async with self._begun(prompt, sampling) as pieces:
            passing = asyncio.ensure_future(self._call(partial(_pass_on, pieces, loop, come)))
            passing.add_done_callback(lambda _: come.put_nowait(None))
            while (piece := await come.get()) is not None:
                yield piece
            await passing  # which may have failed

    @asynccontextmanager
    async def _begun(self, prompt: Prompt, sampling: Sampling) -> AsyncIterator[Pieces]:
        """Pieces that are closed at the end, be they begun only after it: a thread cannot be called back."""
        begun = asyncio.ensure_future(self._call(partial(self._engine.stream, prompt, sampling)))
        try:
            yield await asyncio.shield(begun)
        finally:
            begun.add_done_callback(_close)

    async def chat_prompt(self, messages: Sequence[Mapping[str, str]]) -> str:
        prompt: str = await self._call(partial(self._engine.chat_prompt, messages))
        return prompt

    async def detokenize(self, ids: Sequence[int]) -> str:
        text: str = self._engine.detokenize(ids)
        return text

    async def classify(self, pixels_BD: NDArray[np.float32]) -> NDArray[np.float32]:
        logprobs_BC: NDArray[np.float32] = await self._call(partial(self._engine.classify, pixels_BD))
        return logprobs_BC

    async def check(self) -> None:
        await asyncio.to_thread(self._engine.check)  # also when every engine thread is taken

    async def close(self) -> None:
        """Wait for the calls in progress, then free the model."""
        await asyncio.to_thread(self._engine.close)
        self._pool.shutdown()


class BatchingClassifier(ThreadedEngine):
    """A classifier of this process that takes together what came in while the requests before were classified. (Ray
    Serve's ``batch`` makes up its batches before the one in progress ends: of single requests, under steady load.)
    """

    def __init__(self, engine: ClassifierEngine, pixels: int) -> None:
        super().__init__(engine, 1)
        self._pixels = pixels
        self._waiting: list[Waiting] = []
        self._working: asyncio.Task[None] | None = None

    async def classify(self, pixels_BD: NDArray[np.float32]) -> NDArray[np.float32]:
        if pixels_BD.shape[1] != self._pixels:
            return await super().classify(pixels_BD)  # which says what is wrong, of this request alone
        answer: asyncio.Future[NDArray[np.float32]] = asyncio.get_running_loop().create_future()
        self._waiting.append((pixels_BD, answer))
        if self._working is None:
            self._working = asyncio.ensure_future(self._work())
        return await answer

    async def _work(self) -> None:
        while self._waiting:
            several, self._waiting = self._waiting[:MOST_TOGETHER], self._waiting[MOST_TOGETHER:]
            await self._answer([pair for pair in several if not pair[1].done()])
        self._working = None

    async def _answer(self, several: list[Waiting]) -> None:
        if not several:
            return
        try:
            logprobs_BC = await super().classify(np.concatenate([pixels_BD for pixels_BD, _ in several]))
        except Exception as error:
            for _, answer in several:
                if not answer.done():
                    answer.set_exception(error)
            return
        ends = np.cumsum([len(pixels_BD) for pixels_BD, _ in several])
        for (_, answer), part in zip(several, np.split(logprobs_BC, ends[:-1]), strict=True):
            if not answer.done():
                answer.set_result(part)


def _joined(pieces: Pieces) -> Generation:
    texts, last = [], Piece("")
    for last in pieces:
        texts.append(last.text)
    return Generation("".join(texts), last.finish_reason, last.prompt_tokens, last.completion_tokens)


def _pass_on(pieces: Pieces, loop: asyncio.AbstractEventLoop, come: asyncio.Queue[Piece | None]) -> None:
    for piece in pieces:
        loop.call_soon_threadsafe(come.put_nowait, piece)


def _close(begun: asyncio.Future[Any]) -> None:
    if not begun.cancelled() and begun.exception() is None:
        begun.result().close()
