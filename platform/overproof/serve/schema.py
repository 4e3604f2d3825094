"""What goes over HTTP, in the shape of OpenAI's API (https://platform.openai.com/docs/api-reference/completions)."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

DEFAULT_MAX_TOKENS = 16
MOST_STOPS = 4
MOST_IMAGES = 1024


def _prompt(value: Any) -> Any:
    ids = isinstance(value, list) and all(type(i) is int for i in value)
    if not value or not (isinstance(value, str) or ids):
        raise ValueError("expected text or a list of token ids, not empty")
    return value


def _stop(value: Any) -> Any:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MOST_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise ValueError(f"expected a string, or up to {MOST_STOPS}, none empty")
    return stops


def _image(value: Any) -> list[float]:
    rows = value if isinstance(value, list) else []
    flat = [pixel for row in rows for pixel in (row if isinstance(row, list) else [row])]
    if not flat or not all(type(p) in (int, float) and math.isfinite(p) and 0 <= p <= 1 for p in flat):
        raise ValueError("expected numbers from 0 to 1, as one list or as a list of rows")
    if len({len(row) if isinstance(row, list) else -1 for row in rows}) != 1:
        raise ValueError("rows differ in length; expected a list of numbers, or rows of one length")
    return [float(pixel) for pixel in flat]


class Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    model: str | None = Field(None, description="Id of the served package; may be left out.")


class CompletionRequest(Request):
    """Body of POST /v1/completions."""

    prompt: Annotated[str | list[int], BeforeValidator(_prompt)] = Field(description="Text or token ids.")
    max_tokens: int | None = Field(None, ge=1, description="Most tokens to generate; 16 unless given.")
    temperature: float = Field(0.0, ge=0, le=2, description="0 takes the likeliest token each time.")
    top_p: float = Field(1.0, gt=0, le=1, description="Samples from the likeliest tokens with this much mass.")
    seed: int | None = Field(None, ge=0, lt=2**32 - 1, description="Repeats a sample.")
    stop: Annotated[list[str], BeforeValidator(_stop)] = Field([], description="Ends the text before these.")
    stream: bool = Field(False, description="Server-sent events instead of one reply.")


class ClassifyRequest(Request):
    """Body of POST /v1/classify."""

    images: list[Annotated[list[float], BeforeValidator(_image)]] = Field(
        min_length=1, max_length=MOST_IMAGES, description="Pixels from 0 to 1, flat or as rows."
    )


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Choice(BaseModel):
    index: int = 0
    text: str
    logprobs: None = None
    finish_reason: Literal["stop", "length"] | None


class CompletionReply(BaseModel):
    """A whole completion, or one event of a streamed one: usage comes with the last."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int  # seconds since 1970
    model: str
    system_fingerprint: str  # start of the served file's sha256
    choices: list[Choice]
    usage: Usage | None = None


class Classified(BaseModel):
    index: int
    label: int
    probabilities: list[float]


class ClassifyReply(BaseModel):
    object: Literal["list"] = "list"
    model: str
    system_fingerprint: str
    data: list[Classified]


class Proof(BaseModel):
    """Why this package is served."""

    kind: Literal["text", "digits"]
    candidate: str
    format: str
    sha256: str
    size_bytes: int
    verdict: list[str]
    parents: dict[str, str]


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "overproof"
    overproof: Proof


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None


class ErrorReply(BaseModel):
    error: ErrorDetail
