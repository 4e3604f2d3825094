"""Builds HTTP replies from generated text, in the shape of OpenAI's completions and chats."""

from __future__ import annotations

import codecs
import time
import uuid
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from overproof.engines.base import Completion, FinishReason, PromptReading
from overproof.engines.gguf_tokens import incomplete_utf8_tail
from overproof.package.package import Package, fetch_package
from overproof.serve.async_engine import AsyncEngine, Generation
from overproof.serve.requests import ChatRequest, CompletionRequest, GenerationRequest
from overproof.serve.responses import (
    AssistantMessage,
    ChatChoice,
    ChatEvent,
    ChatEventChoice,
    ChatLogprobs,
    ChatReply,
    CompletionChoice,
    CompletionReply,
    ContentLogprob,
    Delta,
    ModelInfo,
    Provenance,
    TokenLogprobs,
    TopLogprob,
    Usage,
)


@dataclass(frozen=True)
class ServedModel:
    """A model as /v1/models lists it, the engine that has it loaded, and the limit of its requests."""

    model: ModelInfo
    engine: AsyncEngine
    max_tokens: int
    location: str  # folder or URI of its package

    @cached_property
    def folder(self) -> Path:
        """The package on this machine, fetched once where it is remote."""
        return fetch_package(self.location)

    @property
    def reply_fields(self) -> dict[str, str]:
        """The fields of a ``ModelReply``."""
        proof = self.model.overproof
        return {"model": self.model.id, "package": proof.package, "system_fingerprint": proof.sha256[:16]}


@dataclass(frozen=True)
class TokenInfo:
    """A token of a reply, and where in the text it begins, in characters."""

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
                logprobs=_token_logprobs(part.tokens),
            )
            for part in parts
        ]
        return CompletionReply(**self.common_fields, choices=choices, usage=usage)

    def event(self, parts: list[ChoicePart], usage: Usage | None, _started: Container[int]) -> CompletionReply:
        return self.reply(parts, usage)


class ChatResponses(ResponseBuilder[ChatRequest]):
    """The replies of /v1/chat/completions."""

    ID_PREFIX = "chatcmpl"

    @property
    def logprobs(self) -> int | None:
        return (self.request.top_logprobs or 0) if self.request.logprobs else None

    def reply(self, parts: list[ChoicePart], usage: Usage) -> ChatReply:
        choices = [
            ChatChoice(
                index=part.index,
                message=AssistantMessage(content=part.text),
                finish_reason=part.finish_reason,
                logprobs=_chat_logprobs(part.tokens),
            )
            for part in parts
        ]
        return ChatReply(**self.common_fields, choices=choices, usage=usage)

    def event(self, parts: list[ChoicePart], usage: Usage | None, started: Container[int]) -> ChatEvent:
        """``started`` are the choices of which an event was sent before."""
        choices = [
            ChatEventChoice(
                index=part.index,
                delta=Delta(role=None if part.index in started else "assistant", content=part.text or None),
                finish_reason=part.finish_reason,
                logprobs=_chat_logprobs(part.tokens),
            )
            for part in parts
        ]
        return ChatEvent(**self.common_fields, choices=choices, usage=usage)


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
    first = TokenInfo(reading.pieces[0], None, (), 0)
    others = [TokenInfo(piece, score.logprob, score.top, 0)
              for piece, score in zip(reading.pieces[1:], reading.scores, strict=True)]  # fmt: skip
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
        yield TokenInfo(token.piece, token.logprob, token.top, offset)
        before += token.piece
        closed = before[: len(before) - incomplete_utf8_tail(before)]
        offset = len(closed.decode(errors="replace"))


def _token_text(piece: bytes) -> str:
    """A token as OpenAI writes it."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def _token_logprobs(tokens: Sequence[TokenInfo] | None) -> TokenLogprobs | None:
    if tokens is None:
        return None
    return TokenLogprobs(
        tokens=[_token_text(part.piece) for part in tokens],
        token_logprobs=[part.logprob for part in tokens],
        top_logprobs=[
            None
            if part.logprob is None
            else {_token_text(piece): value for _, piece, value in reversed(part.top)}  # of equal texts the likeliest
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
            verdict=[reason.text for reason in package.reasons],
            parents=content.parents,
        ),
    )
