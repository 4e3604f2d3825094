"""Bodies of HTTP replies, in the shape of OpenAI's API (https://platform.openai.com/docs/api-reference)."""

from __future__ import annotations

from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel

from overproof.engines.base import FinishReason
from overproof.tasks.http import ModelReply

SERVER_ERROR = "the server failed; its log says why"


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class GeneratedReply(ModelReply):
    """Fields of completions and chats, and of their events."""

    id: str
    created: int  # seconds since 1970
    usage: Usage | None = None


class TokenLogprobs(BaseModel):
    """One entry for each token of a completion; a token that is not text by itself is written as ``bytes:\\xc3``.

    With ``echo`` they begin with those of the prompt, and end with a closing end-of-text token, which has no text. The
    first is predicted by nothing.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]  # characters


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: TokenLogprobs | None = None
    finish_reason: FinishReason | None  # None while a stream goes on


class CompletionReply(GeneratedReply):
    """A whole completion, or one event of a streamed one."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ContentLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[ContentLogprob]
    refusal: None = None


ChatFinishReason = FinishReason | Literal["tool_calls"]


class FunctionCall(BaseModel):
    name: str
    arguments: str  # a JSON object


class ToolCallReply(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class AssistantMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCallReply] | None = None


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: ChatFinishReason | None  # None while a stream goes on


class ChatReply(GeneratedReply):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]


class FunctionDelta(BaseModel):
    name: str | None = None
    arguments: str = ""


class ToolCallDelta(BaseModel):
    """The begin of a call, with its id and its name, or more of its arguments."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatEventChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: ChatFinishReason | None  # None while a stream goes on


class ChatEvent(GeneratedReply):
    """One event of a streamed chat."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatEventChoice]


RowT = TypeVar("RowT")


class RowsReply(ModelReply, Generic[RowT]):
    """What a task answers for each row of a request: see its ``row_reply``."""

    object: Literal["list"] = "list"
    data: list[RowT]


class Provenance(BaseModel):
    """What proves a package: its file, its verdict and its parents."""

    task: str
    details: dict[str, Any]  # of its data: see the task
    package: str
    candidate: str
    format: str
    sha256: str
    size_bytes: int
    verdict: list[str]
    parents: dict[str, str]
    signed_by: str | None = None  # sha256 of the key, of those that the server trusts


class ModelInfo(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "overproof"
    overproof: Provenance


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelInfo]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorReply(BaseModel):
    error: ErrorDetail
