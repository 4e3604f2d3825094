"""Text generation: from an HTTP request to requests of the engine, and from what it generates to replies and events."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from overproof.engines.base import Completion, FinishReason, Piece, Sampling, ToolSyntax
from overproof.engines.special_names import unmarked
from overproof.errors import InputError
from overproof.serve.async_engine import AsyncEngine, Generation, OnWork, ignore_work
from overproof.serve.grammar import GrammarChecker, GrammarSource, request_grammar
from overproof.serve.grammar_compiler import CompiledGrammar
from overproof.serve.requests import DEFAULT_MAX_TOKENS, ChatRequest, CompletionRequest, GenerationRequest, NamedTool
from overproof.serve.response_builder import (
    ChatResponses,
    ChoicePart,
    CompletionResponses,
    ServedModel,
    choice_tokens,
    token_infos,
)
from overproof.serve.responses import SERVER_ERROR, ErrorDetail, ErrorReply, GeneratedReply, Usage
from overproof.serve.tools import call_grammar, require_tools
from overproof.serve.traffic import Exchange

LOG = logging.getLogger("overproof.serve")
LEAST_TOP_P = 1e-6  # the likeliest token alone, as 0 is, which not every engine takes


@dataclass
class ChoiceResult:
    """One choice of a reply, as far as it is generated."""

    text: str = ""
    finish_reason: FinishReason | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def add(self, part: ChoicePart, prompt_tokens: int, completion_tokens: int) -> None:
        """Append a part; the counts are of all parts together."""
        if not part.is_prompt:
            self.text += part.text
        self.finish_reason = part.finish_reason
        self.prompt_tokens, self.completion_tokens = prompt_tokens, completion_tokens


OnComplete = Callable[[list[ChoiceResult], bool], Awaitable[None]]  # the choices, and whether the server failed
EngineRequest = tuple[Any, Sampling]  # prompt, and how to continue it


def grammar_source(request: GenerationRequest, syntax: ToolSyntax | None) -> GrammarSource | None:
    """The grammar that the text of a request must follow, also where that is a call of a tool; None where any will do.

    Raises:
        InputError: it is too large, or the tool that is chosen is not offered.
    """
    if isinstance(request, ChatRequest) and request.must_call:
        assert syntax is not None
        named = request.tool_choice.function.name if isinstance(request.tool_choice, NamedTool) else None
        return call_grammar(syntax, require_tools(request.tools, named))
    return request_grammar(request)


def build_requests(
    served: ServedModel, request: GenerationRequest, prompts: Sequence[Any], logprobs: int | None, grammar: str | None
) -> list[EngineRequest]:
    """One request of the engine for each choice, prompt by prompt; with a seed, each choice has its own.

    Raises:
        InputError: ``max_tokens`` is above this server's limit.
    """
    limit = served.max_tokens
    if isinstance(request, ChatRequest):
        name, max_tokens = "max_completion_tokens", request.max_completion_tokens or request.max_tokens or limit
    else:
        assert isinstance(request, CompletionRequest)
        given = request.max_tokens
        name, max_tokens = "max_tokens", min(DEFAULT_MAX_TOKENS, limit) if given is None else given
        if max_tokens == 0 and not request.echo:
            raise InputError("max_tokens: found 0; expected 1 or more, or 0 with echo: true")
    if max_tokens > limit:
        raise InputError(f"{name}: found {max_tokens}; this server gives at most {limit}")
    sampling = Sampling(
        max_tokens,
        **request.model_dump(
            include={"temperature", "seed", "stop", "presence_penalty", "frequency_penalty", "logit_bias"}
        ),
        top_p=request.top_p or LEAST_TOP_P,
        logprobs=logprobs,
        grammar=grammar,
        echo=isinstance(request, CompletionRequest) and request.echo,
    )
    seeds = [None if request.seed is None else request.seed + number for number in range(request.n)]
    return [(prompt, replace(sampling, seed=seed)) for prompt in prompts for seed in seeds]


def build_reply(
    builder: CompletionResponses | ChatResponses, generations: Sequence[Generation]
) -> tuple[GeneratedReply, list[ChoiceResult]]:
    """The reply made of all its choices, and the choices."""
    parts = [
        ChoicePart(
            index,
            each.text if each.prompt is None else each.prompt.text + each.text,
            each.finish_reason,
            choice_tokens(each),
        )
        for index, each in enumerate(generations)
    ]
    results = [ChoiceResult(e.text, e.finish_reason, e.prompt_tokens, e.completion_tokens) for e in generations]
    return builder.reply(parts, total_usage(results, builder.request.n)), results


def require_grammar(grammar: CompiledGrammar, generations: Sequence[Generation]) -> None:
    """Check every text that was generated with a grammar.

    Raises:
        InputError: a text does not follow it.
    """
    for each in generations:
        grammar.checker().add(each.text)


def total_usage(results: Sequence[ChoiceResult], n: int) -> Usage:
    """Tokens of a reply; a prompt counts once for its ``n`` choices."""
    prompt = sum(result.prompt_tokens for result in results[::n])
    completion = sum(result.completion_tokens for result in results)
    return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


async def traffic_exchanges(
    builder: CompletionResponses | ChatResponses,
    requests: list[EngineRequest],
    results: list[ChoiceResult],
    seconds: float,
    first_event_s: float | None,
) -> list[Exchange]:
    """Every choice with its prompt, as a row of recorded traffic."""
    served, created = builder.served, datetime.now(UTC)
    texts = [
        unmarked(prompt) if isinstance(prompt, str) else await served.engine.detokenize(prompt)
        for prompt, _ in requests
    ]
    return [
        Exchange(
            builder.id,
            created,
            served.model.overproof.package,
            served.model.id,
            index,
            text,
            result.text,
            result.finish_reason,
            result.prompt_tokens,
            result.completion_tokens,
            seconds,
            first_event_s,
        )
        for index, (text, result) in enumerate(zip(texts, results, strict=True))
    ]


async def stream_events(
    builder: CompletionResponses | ChatResponses,
    requests: list[EngineRequest],
    grammar: CompiledGrammar | None,
    on_complete: OnComplete,
    on_work: OnWork = ignore_work,
) -> AsyncGenerator[str]:
    """Server-sent events of all choices as they are generated; closing the generator ends generation.

    After a first event ``on_complete`` is called however the stream ends.

    Raises:
        InputError: before the first event, the engine refuses the request.
    """
    results, started, failed = [ChoiceResult() for _ in requests], set[int](), False
    try:
        async with aclosing(_merged_parts(builder.served.engine, requests, grammar, on_work)) as pieces:
            async for part, piece in pieces:
                results[part.index].add(part, piece.prompt_tokens, piece.completion_tokens)
                yield _sse(builder.event([part], None, started))
                started.add(part.index)
    except Exception as error:
        if not started:
            raise
        failed = not isinstance(error, InputError)
        LOG.exception("a stream failed", exc_info=error)
        yield _sse(ErrorReply(error=ErrorDetail(message=SERVER_ERROR if failed else str(error), type="server_error")))
        return
    finally:
        if started:
            await on_complete(results, failed)
    if builder.request.stream_options.include_usage:
        yield _sse(builder.event([], total_usage(results, builder.request.n), started))
    yield "data: [DONE]\n\n"


async def _merged_parts(
    engine: AsyncEngine, requests: list[EngineRequest], grammar: CompiledGrammar | None, on_work: OnWork
) -> AsyncGenerator[tuple[ChoicePart, Piece]]:
    """The parts of every choice, in the order in which they are generated."""
    checkers = [None if grammar is None else grammar.checker() for _ in requests]
    if len(requests) == 1:
        async with aclosing(_choice_parts(engine, 0, *requests[0], checkers[0], on_work)) as parts:
            async for part in parts:
                yield part
        return
    queue: asyncio.Queue[tuple[ChoicePart, Piece] | Exception | None] = asyncio.Queue()

    async def pump(index: int, request: EngineRequest) -> None:
        try:
            async with aclosing(_choice_parts(engine, index, *request, checkers[index], on_work)) as parts:
                async for part in parts:
                    queue.put_nowait(part)
        except Exception as error:
            queue.put_nowait(error)
        else:
            queue.put_nowait(None)

    pumps = [asyncio.create_task(pump(index, request)) for index, request in enumerate(requests)]
    running = len(pumps)
    try:
        while running:
            item = await queue.get()
            if item is None:
                running -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item
    finally:
        for each in pumps:
            each.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _choice_parts(
    engine: AsyncEngine, index: int, prompt: Any, sampling: Sampling, checker: GrammarChecker | None, on_work: OnWork
) -> AsyncGenerator[tuple[ChoicePart, Piece]]:
    """The parts of one choice; those with log-probabilities come when it is complete, for llama.cpp streams none. A
    prompt that is told is the first part.
    """
    before = 0  # characters of the prompt
    if sampling.echo:
        generation = await engine.complete(prompt, replace(sampling, max_tokens=0), on_work)
        reading = generation.prompt
        assert reading is not None
        before = len(reading.text)
        tokens, over = choice_tokens(generation), sampling.max_tokens == 0
        reason: FinishReason | None = "length" if over else None
        part = ChoicePart(index, reading.text, reason, tokens, is_prompt=True)
        yield part, Piece("", reason, generation.prompt_tokens, 0)
        if over:
            return
    if sampling.logprobs is not None:
        generation = await engine.complete(prompt, replace(sampling, echo=False), on_work)
        assert generation.completion is not None
        for each in _token_parts(index, generation.completion, before, closing=sampling.echo):
            yield each
        return
    async with aclosing(engine.stream(prompt, replace(sampling, echo=False), on_work)) as pieces:
        async for piece in pieces:
            if checker is not None:
                checker.add(piece.text)
            yield ChoicePart(index, piece.text, piece.finish_reason), piece


def _token_parts(index: int, completion: Completion, before: int, closing: bool) -> Iterator[tuple[ChoicePart, Piece]]:
    """A part for each token of a complete choice, and one for its end; ``before`` it stand so many characters."""
    tokens = list(token_infos(completion, closing))
    ends = [*(token.offset for token in tokens[1:]), len(completion.text)][: len(tokens)]  # there may be none
    for count, (token, end) in enumerate(zip(tokens, ends, strict=True), 1):
        told = replace(token, offset=before + token.offset)
        yield (
            ChoicePart(index, completion.text[token.offset : end], None, [told]),
            Piece("", None, completion.prompt_tokens, count),
        )
    last = Piece("", completion.finish_reason, completion.prompt_tokens, len(completion.tokens))
    yield ChoicePart(index, "", completion.finish_reason), last


def _sse(event: GeneratedReply | ErrorReply) -> str:
    return f"data: {event.model_dump_json()}\n\n"
