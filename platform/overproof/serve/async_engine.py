"""Engines behind an asynchronous interface: what the HTTP routes call, be the engine in this process or in a replica.

Shapes: B rows in a batch, D numbers in a row, V outputs.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from overproof.engines.base import (
    ArrayEngine,
    Cancelled,
    Completion,
    FinishReason,
    Piece,
    PieceStream,
    PromptReading,
    Sampling,
    TextEngine,
    ToolSyntax,
)

ResultT = TypeVar("ResultT")
Prompt = str | Sequence[int]
QueuedRows = tuple[NDArray[np.float32], asyncio.Future[NDArray[np.float32]]]  # inputs_BD, their logprobs_BV
MAX_BATCH_REQUESTS = 16  # more gain a core little, and make those that come meanwhile wait longer


class Busy(Exception):
    """Every replica is at its capacity, and the queue is full."""


@dataclass(frozen=True)
class Generation:
    """A finished text."""

    text: str
    finish_reason: FinishReason | None
    prompt_tokens: int
    completion_tokens: int
    completion: Completion | None = None  # where log-probabilities were asked for
    prompt: PromptReading | None = None  # where it is to be told, too
    seconds: float = field(default=0.0, compare=False)  # of the engine, without waiting; not where those are told


@dataclass
class Work:
    """Tokens that an engine has read and generated for a request."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    def add(self, prompt_tokens: int, completion_tokens: int) -> None:
        """Count more."""
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += completion_tokens

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


# Called once the engine's work for a request has ended, however it did, with all of it.
OnWork = Callable[[Work], object]


def ignore_work(_: Work) -> None:
    """For requests that nobody is charged for."""


class AsyncEngine(Protocol):
    """What ``TextEngine`` and ``ArrayEngine`` do; each method raises as they do, or ``Busy``."""

    async def complete(self, prompt: Prompt, sampling: Sampling, on_work: OnWork = ignore_work) -> Generation:
        """Read a prompt, where it is to be told, and continue it until done; cancelling the call ends both."""

    async def validate(self, prompt: Prompt, sampling: Sampling) -> None:
        """Raise where ``complete`` would refuse the request."""

    def stream(self, prompt: Prompt, sampling: Sampling, on_work: OnWork = ignore_work) -> AsyncGenerator[Piece]:
        """Continue a prompt piece by piece; closing the generator ends generation."""

    async def chat_prompt(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
    ) -> str: ...

    async def tool_syntax(self) -> ToolSyntax: ...

    async def detokenize(self, ids: Sequence[int]) -> str: ...

    async def logprobs(self, inputs_BD: NDArray[np.float32]) -> NDArray[np.float32]: ...

    async def check(self) -> None:
        """Return when the engine answers, raise when it does not."""


class ThreadedEngine:
    """An engine of this process, called from a pool of so many threads; more calls wait."""

    def __init__(self, engine: TextEngine | ArrayEngine, threads: int) -> None:
        self._engine: Any = engine
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="engine")

    async def complete(self, prompt: Prompt, sampling: Sampling, on_work: OnWork = ignore_work) -> Generation:
        work = Work()
        try:
            return await self._complete(prompt, sampling, work)
        finally:
            on_work(work)

    async def _complete(self, prompt: Prompt, sampling: Sampling, work: Work) -> Generation:
        if sampling.echo:
            reading = await self._read_prompt(prompt, sampling, work)
            if not sampling.max_tokens:
                return Generation("", "length", len(reading.ids), 0, prompt=reading)
            return replace(await self._complete(prompt, replace(sampling, echo=False), work), prompt=reading)
        if sampling.logprobs is not None:  # llama.cpp streams none
            cancelled = threading.Event()

            def complete() -> Completion:
                with _counting_cancelled(work):
                    done: Completion = self._engine.complete(prompt, sampling, cancelled)
                work.add(done.prompt_tokens, len(done.tokens))
                return done

            completion = await self._call(complete, cancelled.set)
            return Generation(
                completion.text,
                completion.finish_reason,
                completion.prompt_tokens,
                len(completion.tokens),
                completion,
            )
        async with self._open_stream(prompt, sampling, work) as pieces:
            return await self._call(partial(_join, pieces), pieces.close)

    async def validate(self, prompt: Prompt, sampling: Sampling) -> None:
        await self._call(partial(self._engine.validate, prompt, sampling))

    async def stream(self, prompt: Prompt, sampling: Sampling, on_work: OnWork = ignore_work) -> AsyncGenerator[Piece]:
        work = Work()
        try:
            async with aclosing(self._stream(prompt, sampling, work)) as pieces:
                async for piece in pieces:
                    yield piece
        finally:
            on_work(work)

    async def _stream(self, prompt: Prompt, sampling: Sampling, work: Work) -> AsyncGenerator[Piece]:
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Piece | None]()
        async with self._open_stream(prompt, sampling, work) as pieces:
            forwarding = asyncio.ensure_future(self._call(partial(_forward, pieces, loop, queue), pieces.close))
            forwarding.add_done_callback(lambda _: queue.put_nowait(None))
            try:
                while (piece := await queue.get()) is not None:
                    yield piece
                await forwarding  # raises where it failed
            finally:
                if not forwarding.done():
                    forwarding.cancel()
                    await asyncio.wait([forwarding])

    async def chat_prompt(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        prompt: str = await self._call(partial(self._engine.chat_prompt, messages, tools))
        return prompt

    async def tool_syntax(self) -> ToolSyntax:
        syntax: ToolSyntax = await self._call(self._engine.tool_syntax)
        return syntax

    async def detokenize(self, ids: Sequence[int]) -> str:
        text: str = self._engine.detokenize(ids)
        return text

    async def logprobs(self, inputs_BD: NDArray[np.float32]) -> NDArray[np.float32]:
        logprobs_BV: NDArray[np.float32] = await self._call(partial(self._engine.logprobs, inputs_BD))
        return logprobs_BV

    async def check(self) -> None:
        await asyncio.to_thread(self._engine.check)  # also while every thread of the pool is busy

    async def close(self) -> None:
        """Wait for the calls in progress, then free the model."""
        await asyncio.to_thread(self._engine.close)
        self._pool.shutdown()

    async def _read_prompt(self, prompt: Prompt, sampling: Sampling, work: Work) -> PromptReading:
        cancelled = threading.Event()

        def read() -> PromptReading:
            with _counting_cancelled(work):
                reading: PromptReading = self._engine.read_prompt(prompt, sampling, cancelled)
            work.add(len(reading.ids), 0)
            return reading

        return await self._call(read, cancelled.set)

    async def _call(self, function: Callable[[], ResultT], stop: Callable[[], object] = lambda: None) -> ResultT:
        """What a thread of the pool returns. A caller that is cancelled stops the thread and goes on when it has ended
        its work: only then is its slot free.
        """
        work = self._pool.submit(function)
        result = asyncio.wrap_future(work)
        try:
            return await asyncio.shield(result)
        except asyncio.CancelledError:
            stop()
            if not work.cancel():
                while not result.done():
                    with suppress(asyncio.CancelledError):
                        await asyncio.wait([result])
                result.exception()  # which nobody asks for any more
            raise

    @asynccontextmanager
    async def _open_stream(self, prompt: Prompt, sampling: Sampling, work: Work) -> AsyncIterator[PieceStream]:
        """A stream that is closed at the end, and whose tokens are counted; also one that its thread has opened when
        the caller is cancelled.
        """
        opened = list[PieceStream]()
        try:
            await self._call(lambda: opened.append(self._engine.stream(prompt, sampling)))
            yield opened[0]
        except asyncio.CancelledError:
            for pieces in opened:
                pieces.close()
                await self._call(partial(_join, pieces))  # what is left of it: where nobody had begun to read
            raise
        finally:
            for pieces in opened:
                pieces.close()
                work.add(pieces.prompt_tokens, pieces.completion_tokens)


class BatchingEngine(ThreadedEngine):
    """An array engine of this process that puts the requests which came while the last batch ran into the next one.

    (Ray Serve's ``batch`` makes up its batches before the one in progress ends: of single requests, under steady load.)
    """

    def __init__(self, engine: ArrayEngine) -> None:
        super().__init__(engine, threads=1)
        self._width = engine.width
        self._queue: list[QueuedRows] = []
        self._task: asyncio.Task[None] | None = None

    async def logprobs(self, inputs_BD: NDArray[np.float32]) -> NDArray[np.float32]:
        if inputs_BD.shape[1] != self._width:
            return await super().logprobs(inputs_BD)  # alone, so that the error is of this request
        result: asyncio.Future[NDArray[np.float32]] = asyncio.get_running_loop().create_future()
        self._queue.append((inputs_BD, result))
        if self._task is None:
            self._task = asyncio.ensure_future(self._run_batches())
        return await result

    async def _run_batches(self) -> None:
        while self._queue:
            batch, self._queue = self._queue[:MAX_BATCH_REQUESTS], self._queue[MAX_BATCH_REQUESTS:]
            await self._run_batch([queued for queued in batch if not queued[1].done()])
        self._task = None

    async def _run_batch(self, batch: list[QueuedRows]) -> None:
        if not batch:
            return
        try:
            logprobs_BV = await super().logprobs(np.concatenate([inputs_BD for inputs_BD, _ in batch]))
        except Exception as error:
            for _, result in batch:
                if not result.done():
                    result.set_exception(error)
            return
        ends = np.cumsum([len(inputs_BD) for inputs_BD, _ in batch])
        for (_, result), rows in zip(batch, np.split(logprobs_BV, ends[:-1]), strict=True):
            if not result.done():
                result.set_result(rows)


def _join(pieces: PieceStream) -> Generation:
    texts, last, start_s = [], Piece(""), time.perf_counter()
    for last in pieces:
        texts.append(last.text)
    seconds = time.perf_counter() - start_s
    text = "".join(texts)
    return Generation(text, last.finish_reason, last.prompt_tokens, last.completion_tokens, seconds=seconds)


def _forward(pieces: PieceStream, loop: asyncio.AbstractEventLoop, queue: asyncio.Queue[Piece | None]) -> None:
    for piece in pieces:
        loop.call_soon_threadsafe(queue.put_nowait, piece)


@contextmanager
def _counting_cancelled(work: Work) -> Iterator[None]:
    try:
        yield
    except Cancelled as cancelled:
        work.add(cancelled.prompt_tokens, cancelled.completion_tokens)
        raise
