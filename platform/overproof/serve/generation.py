"""From a request to what the engine is asked, and from what it generates to replies and events."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from overproof.engines.base import Completion, FinishReason, Piece, Sampling
from overproof.errors import InputError
from overproof.serve.async_engine import AsyncEngine, Generation
from overproof.serve.grammar import GrammarChecker, grammar_of
from overproof.serve.requests import DEFAULT_MAX_TOKENS, ChatRequest, CompletionRequest, GenerationRequest
from overproof.serve.response_builder import ChatResponses, ChoicePart, CompletionResponses, ServedModel, token_infos
from overproof.serve.responses import ErrorDetail, ErrorReply, Reply, Usage
from overproof.serve.traffic import Exchange

LOG = logging.getLogger("overproof.serve")
FAILED = "the server failed; its log says why"


@dataclass
class ChoiceResult:
    """What came of one choice so far."""

    text: str = ""
    finish_reason: FinishReason | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def add(self, answer: ChoicePart, prompt_tokens: int, completion_tokens: int) -> None:
        """One more part; the counts are of all parts."""
        self.text += answer.text
        self.finish_reason = answer.finish_reason
        self.prompt_tokens, self.completion_tokens = prompt_tokens, completion_tokens


OnDone = Callable[[list[ChoiceResult], bool], Awaitable[None]]  # told what came of it, and whether the server failed
EngineRequest = tuple[Any, Sampling]  # a prompt, and how it is continued


def build_requests(
    served: ServedModel, request: GenerationRequest, prompts: Sequence[Any], logprobs: int | None
) -> list[EngineRequest]:
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


def complete(
    shape: CompletionResponses | ChatResponses, done: Sequence[Generation]
) -> tuple[Reply, list[ChoiceResult]]:
    """The reply of completions that are done, and what came of them."""
    answers = [
        ChoicePart(index, each.text, each.finish_reason, None if each.done is None else tuple(token_infos(each.done)))
        for index, each in enumerate(done)
    ]
    outcomes = [ChoiceResult(e.text, e.finish_reason, e.prompt_tokens, e.completion_tokens) for e in done]
    return shape.reply(answers, total_usage(outcomes, shape.request.n)), outcomes


def require_grammar(asked: list[EngineRequest], done: Sequence[Generation]) -> None:
    """Let no text pass that is not what its grammar allows.

    Raises:
        InputError: a text is not.
    """
    for (_, sampling), each in zip(asked, done, strict=True):
        if sampling.grammar is not None:
            GrammarChecker(sampling.grammar).add(each.text)


def total_usage(outcomes: Sequence[ChoiceResult], n: int) -> Usage:
    """A prompt counts once, however many choices it has."""
    prompt, completion = sum(o.prompt_tokens for o in outcomes[::n]), sum(o.completion_tokens for o in outcomes)
    return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


async def traffic_exchanges(
    shape: CompletionResponses | ChatResponses,
    asked: list[EngineRequest],
    outcomes: list[ChoiceResult],
    seconds: float,
    first_event_s: float | None,
) -> list[Exchange]:
    """Every choice with its prompt, as traffic is kept."""
    served, created = shape.served, datetime.now(UTC)
    texts = [prompt if isinstance(prompt, str) else await served.backend.detokenize(prompt) for prompt, _ in asked]
    return [
        Exchange(
            shape.id,
            created,
            served.model.overproof.package,
            served.model.id,
            index,
            text,
            outcome.text,
            outcome.finish_reason,
            outcome.prompt_tokens,
            outcome.completion_tokens,
            seconds,
            first_event_s,
        )
        for index, (text, outcome) in enumerate(zip(texts, outcomes, strict=True))
    ]


async def stream_events(
    shape: CompletionResponses | ChatResponses, asked: list[EngineRequest], done: OnDone
) -> AsyncGenerator[str]:
    """Server-sent events of all choices, as their pieces come; generation ends when the client goes.

    ``done`` is told what came of it, however it ends, once it has begun.

    Raises:
        InputError: before the first event, what is wrong with the request.
    """
    outcomes, begun, failed = [ChoiceResult() for _ in asked], set[int](), False
    try:
        async with aclosing(_pieces(shape.served.backend, asked)) as pieces:
            async for answer, piece in pieces:
                outcomes[answer.index].add(answer, piece.prompt_tokens, piece.completion_tokens)
                yield _sse(shape.event([answer], None, begun))
                begun.add(answer.index)
    except Exception as error:
        if not begun:
            raise
        failed = not isinstance(error, InputError)
        LOG.exception("a stream failed", exc_info=error)
        yield _sse(ErrorReply(error=ErrorDetail(message=FAILED if failed else str(error), type="server_error")))
        return
    finally:
        if begun:
            await done(outcomes, failed)
    if shape.request.stream_options.include_usage:
        yield _sse(shape.event([], total_usage(outcomes, shape.request.n), begun))
    yield "data: [DONE]\n\n"


async def _pieces(backend: AsyncEngine, asked: list[EngineRequest]) -> AsyncGenerator[tuple[ChoicePart, Piece]]:
    """The parts of every choice, in the order in which they are generated."""
    if len(asked) == 1:
        async with aclosing(_parts(backend, 0, *asked[0])) as parts:
            async for part in parts:
                yield part
        return
    arrived: asyncio.Queue[tuple[ChoicePart, Piece] | Exception | None] = asyncio.Queue()

    async def pump(index: int, ask: EngineRequest) -> None:
        try:
            async with aclosing(_parts(backend, index, *ask)) as parts:
                async for part in parts:
                    arrived.put_nowait(part)
        except Exception as error:
            arrived.put_nowait(error)
        else:
            arrived.put_nowait(None)

    pumps = [asyncio.create_task(pump(index, ask)) for index, ask in enumerate(asked)]
    left = len(pumps)
    try:
        while left:
            came = await arrived.get()
            if came is None:
                left -= 1
            elif isinstance(came, Exception):
                raise came
            else:
                yield came
    finally:
        for each in pumps:
            each.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _parts(
    backend: AsyncEngine, index: int, prompt: Any, sampling: Sampling
) -> AsyncGenerator[tuple[ChoicePart, Piece]]:
    """One choice, piece by piece; with log-probabilities when it is whole, for what llama.cpp streams has none."""
    if sampling.logprobs is not None:
        done = (await backend.complete(prompt, sampling)).done
        assert done is not None
        for part in _known(index, done):
            yield part
        return
    kept = None if sampling.grammar is None else GrammarChecker(sampling.grammar)
    async with aclosing(backend.stream(prompt, sampling)) as pieces:
        async for piece in pieces:
            if kept is not None:
                kept.add(piece.text)
            yield ChoicePart(index, piece.text, piece.finish_reason), piece


def _known(index: int, done: Completion) -> Iterator[tuple[ChoicePart, Piece]]:
    """A whole choice, token by token."""
    known = list(token_infos(done))
    ends = [part.offset for part in known[1:]] + [len(done.text)]
    for number, (part, end) in enumerate(zip(known, ends, strict=True), 1):
        yield (
            ChoicePart(index, done.text[part.offset : end], None, (part,)),
            Piece("", None, done.prompt_tokens, number),
        )
    yield ChoicePart(index, "", done.finish_reason), Piece("", done.finish_reason, done.prompt_tokens, len(done.tokens))


def _sse(event: Reply | ErrorReply) -> str:
    return f"data: {event.model_dump_json()}\n\n"
