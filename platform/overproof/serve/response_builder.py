"""Builds HTTP replies from generated text, in the shape of OpenAI's completions and chats."""

from __future__ import annotations

import codecs
import time
import uuid
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from overproof.engines.base import Completion, FinishReason, PromptReading, ToolSyntax
from overproof.engines.gguf_tokens import incomplete_utf8_tail
from overproof.package.package import Package
from overproof.package.private_copy import PrivateCopy
from overproof.serve.async_engine import AsyncEngine, Generation
from overproof.serve.requests import ChatRequest, CompletionRequest, GenerationRequest
from overproof.serve.responses import (
    AssistantMessage,
    ChatChoice,
    ChatEvent,
    ChatEventChoice,
    ChatFinishReason,
    ChatLogprobs,
    ChatReply,
    CompletionChoice,
    CompletionReply,
    ContentLogprob,
    Delta,
    FunctionCall,
    FunctionDelta,
    ModelInfo,
    Provenance,
    TokenLogprobs,
    ToolCallDelta,
    ToolCallReply,
    TopLogprob,
    Usage,
)
from overproof.serve.tools import ToolCallParser


@dataclass(frozen=True)
class ServedModel:
    """A model as /v1/models lists it, the engine that has it loaded, and the limit of its requests."""

    model: ModelInfo
    engine: AsyncEngine
    max_tokens: int
    open_copy: Callable[[], PrivateCopy]  # of its package, on this machine
    is_assigned: bool = True  # by the registry; else the request names this version, which is then not judged by it

    @cached_property
    def _copy(self) -> PrivateCopy:
        return self.open_copy()

    @property
    def is_open(self) -> bool:
        """Whether ``folder`` is there at once; else the package may first be copied."""
        return "_copy" in self.__dict__

    @property
    def folder(self) -> Path:
        """The package on this machine, which stays while this value lives."""
        return self._copy.path

    @property
    def reply_fields(self) -> dict[str, str]:
        """The fields of a ``ModelReply``."""
        proof = self.model.overproof
        return {"model": self.model.id, "package": proof.package, "system_fingerprint": proof.sha256[:16]}


@dataclass(frozen=True)
class TokenInfo:
    """A token of a reply, and where in the text it begins, in characters."""

    id: int
    piece: bytes
    logprob: float | None  # of a prompt's first token there is none
    top: tuple[tuple[int, bytes, float], ...]
    offset: int


@dataclass(frozen=True)
class ChoicePart:
    """A choice, or a part of one that is streamed."""

    index: int
    text: str
    finish_reason: FinishReason | None
    tokens: Sequence[TokenInfo] | None = None  # where log-probabilities were asked for
    is_prompt: bool = False  # which was asked to be told, and is not generated


RequestT = TypeVar("RequestT", bound=GenerationRequest)


class ResponseBuilder(Generic[RequestT]):
    """The replies to one request."""

    ID_PREFIX: ClassVar[str]

    def __init__(self, served: ServedModel, request: RequestT) -> None:
        self.served, self.request = served, request
        self.id = f"{self.ID_PREFIX}-{uuid.uuid4().hex}"
        self.common_fields: dict[str, Any] = {**served.reply_fields, "id": self.id, "created": int(time.time())}


class CompletionResponses(ResponseBuilder[CompletionRequest]):
    """The replies of /v1/completions."""

    ID_PREFIX = "cmpl"

    @property
    def logprobs(self) -> int | None:
        return self.request.logprobs

    def reply(self, parts: list[ChoicePart], usage: Usage | None) -> CompletionReply:
        choices = [
            CompletionChoice(
                index=part.index,
                text=part.text,
                finish_reason=part.finish_reason,
                logprobs=_token_logprobs(part.tokens, self.request.return_tokens_as_token_ids),
            )
            for part in parts
        ]
        return CompletionReply(**self.common_fields, choices=choices, usage=usage)

    def event(self, parts: list[ChoicePart], usage: Usage | None, _started: Container[int]) -> CompletionReply:
        return self.reply(parts, usage)


class ChatResponses(ResponseBuilder[ChatRequest]):
    """The replies of /v1/chat/completions."""

    ID_PREFIX = "chatcmpl"

    def __init__(self, served: ServedModel, request: ChatRequest, syntax: ToolSyntax | None = None) -> None:
        """``syntax`` is how calls are written, where tools are offered."""
        super().__init__(served, request)
        self.syntax = syntax
        self._streams: dict[int, _ToolStream] = {}  # by choice

    @property
    def logprobs(self) -> int | None:
        return (self.request.top_logprobs or 0) if self.request.logprobs else None

    def reply(self, parts: list[ChoicePart], usage: Usage) -> ChatReply:
        choices = [
            ChatChoice(
                index=part.index,
                message=message,
                finish_reason=reason,
                logprobs=_chat_logprobs(part.tokens),
            )
            for part in parts
            for message, reason in [self._message(part)]
        ]
        return ChatReply(**self.common_fields, choices=choices, usage=usage)

    def event(self, parts: list[ChoicePart], usage: Usage | None, started: Container[int]) -> ChatEvent:
        """``started`` are the choices of which an event was sent before."""
        choices = [
            ChatEventChoice(
                index=part.index,
                delta=delta.model_copy(update={"role": None if part.index in started else "assistant"}),
                finish_reason=reason,
                logprobs=_chat_logprobs(part.tokens),
            )
            for part in parts
            for delta, reason in [self._delta(part)]
        ]
        return ChatEvent(**self.common_fields, choices=choices, usage=usage)

    def _message(self, part: ChoicePart) -> tuple[AssistantMessage, ChatFinishReason | None]:
        if self.syntax is None:
            return AssistantMessage(content=part.text), part.finish_reason
        stream = _ToolStream(self.syntax, self.request)
        delta, calls = stream.delta(part), list[ToolCallReply]()
        for each in delta.tool_calls or ():
            if each.id is not None:
                calls.append(
                    ToolCallReply(id=each.id, function=FunctionCall(name=each.function.name or "", arguments=""))
                )
            calls[-1].function.arguments += each.function.arguments
        content = delta.content or (None if calls else "")
        return AssistantMessage(content=content, tool_calls=calls or None), stream.finish_reason(part)

    def _delta(self, part: ChoicePart) -> tuple[Delta, ChatFinishReason | None]:
        if self.syntax is None:
            return Delta(content=part.text or None), part.finish_reason
        stream = self._streams.setdefault(part.index, _ToolStream(self.syntax, self.request))
        return stream.delta(part), stream.finish_reason(part)


class _ToolStream:
    """The text and the calls of a choice."""

    def __init__(self, syntax: ToolSyntax, request: ChatRequest) -> None:
        names = [tool.function.name for tool in request.offered_tools]
        self._parser = ToolCallParser(syntax, names, one_call=not request.parallel_tool_calls)
        self._calls = 0

    def delta(self, part: ChoicePart) -> Delta:
        """What is known after one more part."""
        found = self._parser.add(part.text)
        if part.finish_reason is not None:
            found += self._parser.finish()
        calls = list[ToolCallDelta]()
        for each in found:
            if each.name is not None:
                id_, function = f"call_{uuid.uuid4().hex}", FunctionDelta(name=each.name)
                calls.append(ToolCallDelta(index=self._calls, id=id_, type="function", function=function))
                self._calls += 1
            elif each.arguments:
                calls.append(ToolCallDelta(index=self._calls - 1, function=FunctionDelta(arguments=each.arguments)))
        return Delta(content="".join(each.text for each in found) or None, tool_calls=calls or None)

    def finish_reason(self, part: ChoicePart) -> ChatFinishReason | None:
        """A call that is whole, after which nothing counts, was not cut off."""
        is_whole = part.finish_reason == "stop" or (part.finish_reason is not None and self._parser.is_over)
        return "tool_calls" if self._calls and is_whole else part.finish_reason


def choice_tokens(generation: Generation) -> list[TokenInfo] | None:
    """The tokens of a choice where log-probabilities were asked for: of its prompt where that is told, and of what
    was generated.
    """
    reading, completion = generation.prompt, generation.completion
    if completion is None and (reading is None or reading.scores is None):
        return None
    prompt = [] if reading is None else list(prompt_infos(reading))
    if completion is None:
        return prompt
    generated = token_infos(completion, closing=reading is not None)
    before = 0 if reading is None else len(reading.text)
    return prompt + [replace(token, offset=before + token.offset) for token in generated]


def prompt_infos(reading: PromptReading) -> Iterator[TokenInfo]:
    """The tokens of a prompt."""
    assert reading.scores is not None
    decode, offset = codecs.getincrementaldecoder("utf-8")("replace").decode, 0
    first = TokenInfo(reading.ids[0], reading.pieces[0], None, (), 0)
    told = zip(reading.ids[1:], reading.pieces[1:], reading.scores, strict=True)
    others = [TokenInfo(id_, piece, score.logprob, score.top, 0) for id_, piece, score in told]
    for token in (first, *others):
        yield replace(token, offset=offset)
        offset += len(decode(token.piece))


def token_infos(completion: Completion, closing: bool = False) -> Iterator[TokenInfo]:
    """The tokens of the text, without those of a stop string, and without a closing end-of-text token unless it is
    asked for.
    """
    assert completion.token_logprobs is not None
    before, offset = b"", 0
    for token in completion.token_logprobs:
        if offset >= len(completion.text) and (token.piece or not closing):
            return
        yield TokenInfo(token.id, token.piece, token.logprob, token.top, offset)
        before += token.piece
        closed = before[: len(before) - incomplete_utf8_tail(before)]
        offset = len(closed.decode(errors="replace"))


def _token_text(piece: bytes) -> str:
    """A token as OpenAI writes it."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def _token_logprobs(tokens: Sequence[TokenInfo] | None, by_id: bool) -> TokenLogprobs | None:
    if tokens is None:
        return None

    def name(id_: int, piece: bytes) -> str:
        return f"token_id:{id_}" if by_id else _token_text(piece)

    return TokenLogprobs(
        tokens=[name(part.id, part.piece) for part in tokens],
        token_logprobs=[part.logprob for part in tokens],
        top_logprobs=[
            None
            if part.logprob is None
            else {name(id_, piece): value for id_, piece, value in reversed(part.top)}  # of equal texts the likeliest
            for part in tokens
        ],
        text_offset=[part.offset for part in tokens],
    )


def _chat_logprobs(tokens: Sequence[TokenInfo] | None) -> ChatLogprobs | None:
    if tokens is None:
        return None
    return ChatLogprobs(
        content=[
            ContentLogprob(
                token=_token_text(part.piece),
                logprob=part.logprob,
                bytes=list(part.piece),
                top_logprobs=[
                    TopLogprob(token=_token_text(piece), logprob=value, bytes=list(piece))
                    for _, piece, value in part.top
                ],
            )
            for part in tokens
            if part.logprob is not None
        ]
    )


def model_info(package: Package) -> ModelInfo:
    """A package as /v1/models lists it."""
    content = package.content
    return ModelInfo(
        id=content.name,
        created=int(datetime.fromisoformat(content.created).timestamp()),
        overproof=Provenance(
            task=content.task,
            details=content.details,
            package=content.id,
            candidate=content.candidate,
            format=content.model_format,
            sha256=package.sha256,
            size_bytes=package.size_bytes,
            verdict=list(package.judged.lines),
            parents=content.parents,
            signed_by=package.signed_by,
        ),
    )
