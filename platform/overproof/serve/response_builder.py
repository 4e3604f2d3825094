"""How what is generated is written: as OpenAI's completions, or as its chats."""

from __future__ import annotations

import time
import uuid
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, ClassVar, Generic, TypeVar

from overproof.engines.base import Completion, FinishReason, Token
from overproof.engines.gguf_tokens import incomplete_utf8_tail
from overproof.package.package import Package
from overproof.serve.async_engine import AsyncEngine
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
    Proof,
    TokenLogprobs,
    TopLogprob,
    Usage,
)


@dataclass(frozen=True)
class ServedModel:
    """A package as /v1/models tells of it, what has loaded it, and what a request may ask."""

    model: ModelInfo
    backend: AsyncEngine
    max_tokens: int

    @property
    def named(self) -> dict[str, str]:
        """The fields of a ``Reply``."""
        proof = self.model.overproof
        return {"model": self.model.id, "package": proof.package, "system_fingerprint": proof.sha256[:16]}


@dataclass(frozen=True)
class TokenInfo:
    """A token of a text: as it is written in a reply, and where it begins, in characters."""

    token: Token
    text: str
    offset: int


@dataclass(frozen=True)
class ChoicePart:
    """One choice, or a part of one that is streamed."""

    index: int
    text: str
    finish_reason: FinishReason | None
    told: tuple[TokenInfo, ...] | None = None  # where log-probabilities were asked for


RequestT = TypeVar("RequestT", bound=GenerationRequest)


class ResponseBuilder(Generic[RequestT]):
    """The replies to one request."""

    PREFIX: ClassVar[str]  # of ids

    def __init__(self, served: ServedModel, request: RequestT) -> None:
        self.served, self.request = served, request
        self.id = f"{self.PREFIX}-{uuid.uuid4().hex}"
        self.head: dict[str, Any] = {**served.named, "id": self.id, "created": int(time.time())}  # of every reply


class CompletionResponses(ResponseBuilder[CompletionRequest]):
    """The replies of /v1/completions."""

    PREFIX = "cmpl"

    @property
    def logprobs(self) -> int | None:
        return self.request.logprobs

    def reply(self, answers: list[ChoicePart], usage: Usage | None) -> CompletionReply:
        choices = [
            CompletionChoice(
                index=a.index, text=a.text, finish_reason=a.finish_reason, logprobs=_token_logprobs(a.told)
            )
            for a in answers
        ]
        return CompletionReply(**self.head, choices=choices, usage=usage)

    def event(self, answers: list[ChoicePart], usage: Usage | None, _begun: Container[int]) -> CompletionReply:
        return self.reply(answers, usage)


class ChatResponses(ResponseBuilder[ChatRequest]):
    """The replies of /v1/chat/completions."""

    PREFIX = "chatcmpl"

    @property
    def logprobs(self) -> int | None:
        return (self.request.top_logprobs or 0) if self.request.logprobs else None

    def reply(self, answers: list[ChoicePart], usage: Usage) -> ChatReply:
        choices = [
            ChatChoice(
                index=a.index,
                message=AssistantMessage(content=a.text),
                finish_reason=a.finish_reason,
                logprobs=_chat_logprobs(a.told),
            )
            for a in answers
        ]
        return ChatReply(**self.head, choices=choices, usage=usage)

    def event(self, answers: list[ChoicePart], usage: Usage | None, begun: Container[int]) -> ChatEvent:
        """``begun`` are the choices of which an event was sent before."""
        choices = [
            ChatEventChoice(
                index=a.index,
                delta=Delta(role=None if a.index in begun else "assistant", content=a.text or None),
                finish_reason=a.finish_reason,
                logprobs=_chat_logprobs(a.told),
            )
            for a in answers
        ]
        return ChatEvent(**self.head, choices=choices, usage=usage)


def token_infos(done: Completion) -> Iterator[TokenInfo]:
    """The tokens that are in the text: not one that ends it, nor those of a stop string."""
    assert done.taken is not None
    before, offset = b"", 0
    for token in done.taken:
        if offset >= len(done.text):
            return
        yield TokenInfo(token, _written(token.piece), offset)
        before += token.piece
        closed = before[: len(before) - incomplete_utf8_tail(before)]
        offset = len(closed.decode(errors="replace"))


def _written(piece: bytes) -> str:
    """A token as OpenAI writes it."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def _token_logprobs(told: Sequence[TokenInfo] | None) -> TokenLogprobs | None:
    if told is None:
        return None
    return TokenLogprobs(
        tokens=[part.text for part in told],
        token_logprobs=[part.token.logprob for part in told],
        top_logprobs=[{_written(piece): value for _, piece, value in part.token.likeliest} for part in told],
        text_offset=[part.offset for part in told],
    )


def _chat_logprobs(told: Sequence[TokenInfo] | None) -> ChatLogprobs | None:
    if told is None:
        return None
    return ChatLogprobs(
        content=[
            ContentLogprob(
                token=part.text,
                logprob=part.token.logprob,
                bytes=list(part.token.piece),
                top_logprobs=[
                    TopLogprob(token=_written(piece), logprob=value, bytes=list(piece))
                    for _, piece, value in part.token.likeliest
                ],
            )
            for part in told
        ]
    )


def model_info(package: Package) -> ModelInfo:
    """A package as /v1/models lists it."""
    content = package.content
    return ModelInfo(
        id=content.name,
        created=int(datetime.fromisoformat(content.created).timestamp()),
        overproof=Proof(
            kind=content.kind,
            package=content.id,
            candidate=content.candidate,
            format=content.model_format,
            sha256=package.sha256,
            size_bytes=package.size_bytes,
            verdict=[reason.text for reason in package.reasons],
            parents=content.parents,
        ),
    )
