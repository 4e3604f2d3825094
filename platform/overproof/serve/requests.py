"""Bodies of HTTP requests, in the shape of OpenAI's API (https://platform.openai.com/docs/api-reference)."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from overproof.tasks.http import ModelRequest, UnicodeText, check_unicode

DEFAULT_MAX_TOKENS = 16
MAX_STOPS = 16
MAX_CHOICES = 16
MAX_BIASES = 300
MAX_MESSAGES = 1024
MAX_GRAMMAR_CHARACTERS = 16384


def _parse_prompts(value: Any) -> Any:
    is_single = isinstance(value, str) or (isinstance(value, list) and all(type(i) is int for i in value))
    prompts = [value] if is_single else value
    if not isinstance(prompts, list) or not all(_is_prompt(prompt) for prompt in prompts):
        raise ValueError("expected text or a list of token ids, or a list of such, none empty")
    return prompts


def _is_prompt(value: Any) -> bool:
    return bool(value) and (isinstance(value, str) or (isinstance(value, list) and all(type(i) is int for i in value)))


def _parse_logit_bias(value: Any) -> Any:
    """Token ids are numbers, of which JSON objects have none as keys."""
    ids = value if isinstance(value, dict) else {"": ""}
    if len(ids) > MAX_BIASES or not all(str(key).isdecimal() and _is_bias(bias) for key, bias in ids.items()):
        raise ValueError(f"expected token ids with numbers from -100 to 100, {MAX_BIASES} at most")
    return {int(key): float(bias) for key, bias in ids.items()}


def _is_bias(bias: Any) -> bool:
    return type(bias) in (int, float) and -100 <= bias <= 100


def _parse_content(value: Any) -> Any:
    """Text, given as a string or in parts."""
    if isinstance(value, list):
        parts = [part if isinstance(part, dict) and part.get("type") == "text" else {} for part in value]
        texts = [text for part in parts if isinstance(text := part.get("text"), str)]
        if len(texts) != len(value):
            raise ValueError("expected text, or parts of type 'text'")
        return "".join(texts)
    return value


def _parse_stops(value: Any) -> Any:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise ValueError(f"expected a string, or up to {MAX_STOPS}, none empty")
    return [check_unicode(stop) for stop in stops]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    include_usage: bool = Field(False, description="One more event at the end, with the usage and no choices.")


class JsonSchemaFormat(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: str = Field(description="Taken, and not looked at.")
    description: str | None = None
    json_schema: dict[str, Any] = Field({}, alias="schema", description="What the JSON must be (JSON Schema).")
    strict: bool | None = Field(None, description="The schema is kept to in any case.")


class ResponseFormat(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> Self:
        if (self.json_schema is None) != (self.type != "json_schema"):
            raise ValueError("json_schema belongs to type 'json_schema' and to no other")
        return self


class GenerationRequest(ModelRequest):
    """What completions and chats have in common."""

    temperature: float = Field(1.0, ge=0, le=2, description="0 takes the likeliest token each time.")
    top_p: float = Field(1.0, gt=0, le=1, description="Samples from the likeliest tokens with this much mass.")
    seed: int | None = Field(None, ge=0, lt=2**32 - MAX_CHOICES, description="Repeats a sample.")
    stop: Annotated[list[str], BeforeValidator(_parse_stops)] = Field([], description="Ends the text before these.")
    n: int = Field(1, ge=1, le=MAX_CHOICES, description="Choices; with a seed, each has its own.")
    presence_penalty: float = Field(0.0, ge=-2, le=2, description="Off the logit of every token that occurred.")
    frequency_penalty: float = Field(0.0, ge=-2, le=2, description="Off the logit, for each time that it occurred.")
    logit_bias: Annotated[dict[int, float], BeforeValidator(_parse_logit_bias)] = Field(
        {}, description="Added to the logits of these token ids, -100 to 100."
    )
    response_format: ResponseFormat = Field(ResponseFormat(), description="Text, JSON, or JSON of a schema.")
    grammar: UnicodeText | None = Field(
        None,
        min_length=1,
        max_length=MAX_GRAMMAR_CHARACTERS,
        description="What the text must be: llama.cpp's GBNF, or llguidance's Lark.",
    )
    stream: bool = Field(False, description="Server-sent events instead of one reply.")
    stream_options: StreamOptions = StreamOptions()

    @property
    def constrained(self) -> bool:
        """Whether the text must follow a schema or a grammar."""
        return self.grammar is not None or self.response_format.type != "text"


class CompletionRequest(GenerationRequest):
    """Body of POST /v1/completions."""

    prompt: Annotated[list[str | list[int]], BeforeValidator(_parse_prompts)] = Field(
        description="Text or token ids, or a list of those; choices come prompt by prompt."
    )
    max_tokens: int | None = Field(
        None, ge=0, description="Most tokens to generate; 16 unless given. 0, with echo, generates none."
    )
    echo: bool = Field(
        False, description="The text begins with the prompt, and `logprobs` are of its tokens, too: null of the first."
    )
    logprobs: int | None = Field(
        None, ge=0, le=5,
        description="Likeliest tokens named at each place; streamed, the events come when the text is whole.",
    )  # fmt: skip

    @model_validator(mode="after")
    def _check_choices(self) -> Self:
        if len(self.prompt) * self.n > MAX_CHOICES:
            raise ValueError(f"{len(self.prompt)} prompts with n {self.n}: expected at most {MAX_CHOICES} choices")
        return self


class ChatMessage(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_parse_content)]
    name: str | None = Field(None, description="Taken, and not looked at.")


class ChatRequest(GenerationRequest):
    """Body of POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: int | None = Field(None, ge=1, description="As max_completion_tokens.")
    max_completion_tokens: int | None = Field(None, ge=1, description="Most tokens to generate; all unless given.")
    logprobs: bool = Field(
        False, description="Log-probabilities; streamed, the events come when the text is whole."
    )  # fmt: skip
    top_logprobs: int | None = Field(None, ge=0, le=20, description="Likeliest tokens named at each place.")

    @model_validator(mode="after")
    def _check_consistent(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise ValueError("max_tokens and max_completion_tokens mean the same; give one")
        return self


class RatingRequest(BaseModel):
    """Body of POST /v1/ratings."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    id: UnicodeText = Field(min_length=1, max_length=64, description="The reply's id.")
    rating: float = Field(ge=-1, le=1, description="From -1, of no use, to 1, very good.")
    comment: UnicodeText = Field("", max_length=4096, description="Why.")
