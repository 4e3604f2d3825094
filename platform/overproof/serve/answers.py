"""From a request to what the engine is asked, and from what it generates to replies and events."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

from overproof.errors import InputError
from overproof.serve.engines.base import Completion, FinishReason, Piece, Sampling, TextEngine
from overproof.serve.grammar import grammar_of
from overproof.serve.replies import ErrorDetail, ErrorReply, Reply, Usage
from overproof.serve.schema import DEFAULT_MAX_TOKENS, ChatRequest, CompletionRequest, Generated
from overproof.serve.shapes import Answer, Chat, Completions, Served, told
from overproof.serve.traffic import Exchange

LOG = logging.getLogger("overproof.serve")
FAILED = "the server failed; its log says why"


@dataclass
class Outcome:
    """What came of one choice so far."""

    text: str = ""
    finish_reason: FinishReason | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def add(self, answer: Answer, prompt_tokens: int, completion_tokens: int) -> None:
        """One more part; the counts are of all parts."""
        self.text += answer.text
        self.finish_reason = answer.finish_reason
        self.prompt_tokens, self.completion_tokens = prompt_tokens, completion_tokens


Done = Callable[[list[Outcome]], Awaitable[None]]
Call = Callable[[Callable[[], Any]], Any]  # runs an engine call in a thread, and is awaited
Ask = tuple[Any, Sampling]  # a prompt, and how it is continued


def asks(served: Served, request: Generated, prompts: Sequence[Any], logprobs: int | None) -> list[Ask]:
    """What the engine is asked for each choice, prompt by prompt; with a seed, each choice has its own.

    Raises:
        InputError: more tokens are asked for than this server gives, or the grammar cannot be kept to.
    """
    most = served.max_tokens
    if isinstance(request, ChatRequest):
        name, asked = "max_completion_tokens", request.max_completion_tokens or request.max_tokens or most
    else:
        assert isinstance(request, CompletionRequest)
        name, asked = "max_tokens", request.max_tokens or min(DEFAULT_MAX_TOKENS, most)
    if asked > most:
        raise InputError(f"{name}: found {asked}; this server gives at most {most}")
    sampling = Sampling(
        asked,
        **request.model_dump(
            include={"temperature", "top_p", "seed", "stop", "presence_penalty", "frequency_penalty", "logit_bias"}
        ),
        logprobs=logprobs,
        grammar=grammar_of(request),
    )
    seeds = [None if request.seed is None else request.seed + number for number in range(request.n)]
    return [(prompt, replace(sampling, seed=seed)) for prompt in prompts for seed in seeds]


def whole(shape: Completions | Chat, done: Sequence[Completion]) -> tuple[Reply, list[Outcome]]:
    """The reply of completions that are done, and what came of them."""
    answers = [
        Answer(index, each.text, each.finish_reason, None if each.taken is None else tuple(told(each)))
        for index, each in enumerate(done)
    ]
    outcomes = [Outcome(e.text, e.finish_reason, e.prompt_tokens, len(e.tokens)) for e in done]
    return shape.reply(answers, usage_of(outcomes, shape.request.n)), outcomes


def usage_of(outcomes: Sequence[Outcome], n: int) -> Usage:
    """A prompt counts once, however many choices it has."""
    prompt, completion = sum(o.prompt_tokens for o in outcomes[::n]), sum(o.completion_tokens for o in outcomes)
    return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


def exchanges(
    shape: Completions | Chat, asked: list[Ask], outcomes: list[Outcome], seconds: float, first_event_s: float | None
) -> Iterator[Exchange]:
    """Every choice with its prompt, as traffic is kept."""
    served, created = shape.served, datetime.now(UTC)
    for index, ((prompt, _), outcome) in enumerate(zip(asked, outcomes, strict=True)):
        text = prompt if isinstance(prompt, str) else served.engine.detokenize(prompt)  # type: ignore[union-attr]
        yield Exchange(
            shape.id, created, served.package.content.id, served.package.content.name, index, text, outcome.text,
            outcome.finish_reason, outcome.prompt_tokens, outcome.completion_tokens, seconds, first_event_s,
        )  # fmt: skip


async def streamed(
    shape: Completions | Chat, engine: Any, asked: list[Ask], call: Call, done: Done
) -> AsyncGenerator[str]:
    """Server-sent events of all choices, as their pieces come; generation ends when the client goes.

    ``done`` is told what came of it, however it ends, once it has begun.

    Raises:
        InputError: before the first event, what is wrong with the request.
    """
    outcomes, begun = [Outcome() for _ in asked], set[int]()
    try:
        async with aclosing(_pieces(engine, asked, call)) as pieces:
            async for answer, piece in pieces:
                outcomes[answer.index].add(answer, piece.prompt_tokens, piece.completion_tokens)
                yield _sse(shape.event([answer], None, begun))
                begun.add(answer.index)
    except Exception as error:
        if not begun:
            raise
        LOG.exception("a stream failed", exc_info=error)
        yield _sse(ErrorReply(error=ErrorDetail(message=FAILED, type="server_error")))
        return
    finally:
        if begun:
            await done(outcomes)
    if shape.request.stream_options.include_usage:
        yield _sse(shape.event([], usage_of(outcomes, shape.request.n), begun))
    yield "data: [DONE]\n\n"


async def _pieces(engine: Any, asked: list[Ask], call: Call) -> AsyncGenerator[tuple[Answer, Piece]]:
    """The parts of every choice, in the order in which they are generated."""
    arrived: asyncio.Queue[tuple[Answer, Piece] | Exception | None] = asyncio.Queue()
    sources: list[Any] = []
    over = asyncio.Event()

    async def pump(index: int, ask: Ask) -> None:
        try:
            source = await call(partial(_source, engine, index, *ask))
            sources.append(source)
            if over.is_set():
                source.close()
            while (part := await call(partial(next, source, None))) is not None:
                arrived.put_nowait(part)
        except Exception as error:
            arrived.put_nowait(error)
        else:
            arrived.put_nowait(None)

    pumps = [asyncio.create_task(pump(index, ask)) for index, ask in enumerate(asked)]
    left = len(pumps)
    try:
        while left:
            part = await arrived.get()
            if part is None:
                left -= 1
            elif isinstance(part, Exception):
                raise part
            else:
                yield part
    finally:
        over.set()  # the pumps end by themselves: a thread that begins to generate cannot be called back
        for source in sources:
            source.close()


class _Source:
    """One choice, piece by piece, while it is generated."""

    def __init__(self, engine: TextEngine, index: int, prompt: Any, sampling: Sampling) -> None:
        self.index, self.pieces = index, engine.stream(prompt, sampling)

    def __next__(self) -> tuple[Answer, Piece]:
        piece = next(self.pieces)
        return Answer(self.index, piece.text, piece.finish_reason), piece

    def close(self) -> None:
        self.pieces.close()


class _Known:
    """One choice, token by token, when it is whole: what llama.cpp streams leaves out log-probabilities."""

    def __init__(self, index: int, done: Completion) -> None:
        known = list(told(done))
        ends = [part.offset for part in known[1:]] + [len(done.text)]
        self.parts = [
            (Answer(index, done.text[part.offset : end], None, (part,)), Piece("", None, done.prompt_tokens, number))
            for number, (part, end) in enumerate(zip(known, ends, strict=True), 1)
        ]
        last = Piece("", done.finish_reason, done.prompt_tokens, len(done.tokens))
        self.parts.append((Answer(index, "", done.finish_reason), last))
        self.left = iter(self.parts)

    def __next__(self) -> tuple[Answer, Piece]:
        return next(self.left)

    def close(self) -> None:
        """Nothing goes on."""


def _source(engine: TextEngine, index: int, prompt: Any, sampling: Sampling) -> _Source | _Known:
    if sampling.logprobs is None:
        return _Source(engine, index, prompt, sampling)
    return _Known(index, engine.complete(prompt, sampling))


def _sse(event: Reply | ErrorReply) -> str:
    return f"data: {event.model_dump_json()}\n\n"
