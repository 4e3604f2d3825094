"""Bodies of HTTP requests, in the shape of OpenAI's API (https://platform.openai.com/docs/api-reference)."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, FailFast, Field, field_validator, model_validator

from overproof.serve.bodies import excess
from overproof.serve.unicode_body import surrogate_path
from overproof.tasks.http import ModelRequest, RequestPart, UnicodeText, check_unicode

DEFAULT_MAX_TOKENS = 16
MAX_STOPS = 16
MAX_CHOICES = 16
MAX_PROMPT_IDS = 1 << 18  # of all prompts together
SEEDS = 2**32 - MAX_CHOICES
ANY = object()
# Fields of OpenAI's API that change nothing here, with the value with which they do: others are refused by name.
NEUTRAL = {
    "store": ANY, "metadata": ANY, "service_tier": ANY, "safety_identifier": ANY, "prompt_cache_key": ANY,
    "prompt_cache_retention": ANY, "best_of": 1, "echo": False, "suffix": "", "modalities": ["text"], "functions": [],
    "function_call": "none", "top_k": -1, "min_p": 0, "repetition_penalty": 1,
}  # fmt: skip
NEUTRAL_OF_MESSAGE: dict[str, Any] = {"annotations": []}  # of a reply that is sent back
MAX_BIASES = 300
MAX_LOGPROBS = 20
MAX_MESSAGES = 1024
MAX_CONTENT_PARTS = 1024  # of a message
MAX_TOOLS = 128
MAX_CALLS = 4096  # of all messages together
MAX_GRAMMAR_CHARACTERS = 16384


def _fold_seed(seed: int | None) -> int | None:
    return None if seed in (None, -1) else seed % SEEDS


def _parse_prompts(value: Any) -> Any:
    """Lengths first: to look at each of a million entries takes seconds."""
    is_single = isinstance(value, str) or (isinstance(value, list) and all(type(i) is int for i in value[:1]))
    prompts = [value] if is_single else value
    if isinstance(prompts, list) and len(prompts) > MAX_CHOICES:
        raise ValueError(f"{len(prompts)} prompts: expected at most {MAX_CHOICES} choices")
    ids = sum(len(prompt) for prompt in prompts if isinstance(prompt, list)) if isinstance(prompts, list) else 0
    if ids > MAX_PROMPT_IDS:
        raise ValueError(f"{ids} token ids in all prompts: expected at most {MAX_PROMPT_IDS}")
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
        if len(value) > MAX_CONTENT_PARTS:
            raise ValueError(f"{len(value)} parts: expected at most {MAX_CONTENT_PARTS}")
        parts = [part if isinstance(part, dict) and part.get("type") == "text" else {} for part in value]
        texts = [text for part in parts if isinstance(text := part.get("text"), str)]
        if len(texts) != len(value):
            raise ValueError("expected text, or parts of type 'text'")
        return "".join(texts)
    return value


def _check_calls(messages: Any) -> Any:
    """Each takes as long as a message."""
    found = [each for each in messages if isinstance(each, dict)] if isinstance(messages, list) else []
    count = sum(len(calls) for each in found if isinstance(calls := each.get("tool_calls"), list))
    if count > MAX_CALLS:
        raise ValueError(f"{count} tool_calls: expected at most {MAX_CALLS}")
    return messages


def _parse_stops(value: Any) -> Any:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise ValueError(f"expected a string, or up to {MAX_STOPS}, none empty")
    return [check_unicode(stop) for stop in stops]


def _without(neutral: dict[str, Any], model: type[BaseModel], body: Any) -> Any:
    """The body without fields that the model does not know and that ask for nothing."""
    if not isinstance(body, dict):
        return body
    known = model.model_fields
    return {
        name: value
        for name, value in body.items()
        if name in known or name not in neutral or (neutral[name] is not ANY and value != neutral[name])
    }


class StreamOptions(RequestPart):
    include_usage: bool = Field(False, description="One more event at the end, with the usage and no choices.")
    include_obfuscation: bool = Field(False, description="Taken, and not looked at.")


class JsonSchemaFormat(RequestPart):
    name: str = Field(description="Taken, and not looked at.")
    description: str | None = None
    json_schema: dict[str, Any] = Field({}, alias="schema", description="What the JSON must be (JSON Schema).")
    strict: bool | None = Field(None, description="The schema is kept to in any case.")


class ResponseFormat(RequestPart):
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
    top_p: float = Field(1.0, ge=0, le=1, description="Samples from the likeliest tokens with this much mass.")
    seed: Annotated[int | None, AfterValidator(_fold_seed)] = Field(
        None, description="Repeats a sample; -1 is none, and others are taken modulo 4,294,967,280."
    )
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

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, body: Any) -> Any:
        """Clients send what asks for nothing, or for what is done with every request."""
        return _without(NEUTRAL, cls, body)

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
        None, ge=0, le=MAX_LOGPROBS,
        description="Likeliest tokens named at each place; streamed, the events come when the text is whole.",
    )  # fmt: skip
    return_tokens_as_token_ids: bool = Field(
        False, description="Tokens in `logprobs` are named token_id:N, as vLLM has it: of two, the texts may be equal."
    )

    @model_validator(mode="after")
    def _check_choices(self) -> Self:
        if len(self.prompt) * self.n > MAX_CHOICES:
            raise ValueError(f"{len(self.prompt)} prompts with n {self.n}: expected at most {MAX_CHOICES} choices")
        return self


class ToolFunction(RequestPart):
    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] = Field(
        {"type": "object", "properties": {}, "additionalProperties": False},
        description="What the arguments must be (JSON Schema of an object); there are none unless given.",
    )
    strict: bool | None = Field(
        None, description="Taken, and changes nothing: a call that must be made follows its schema, and no other does."
    )


class Tool(RequestPart):
    type: Literal["function"]
    function: ToolFunction


class FunctionName(RequestPart):
    name: str


class NamedTool(RequestPart):
    type: Literal["function"]
    function: FunctionName


class CalledFunction(RequestPart):
    name: str
    arguments: str = Field(description="A JSON object.")

    @field_validator("arguments")
    @classmethod
    def _check_arguments(cls, arguments: str) -> str:
        if found := excess(check_unicode(arguments).encode()):
            raise ValueError(f"found {found}")
        try:
            found = json.loads(arguments or "{}")
            is_object = isinstance(found, dict) and surrogate_path(found) is None
        except ValueError:
            is_object = False
        if not is_object:
            raise ValueError("expected a JSON object, as a string")
        return arguments


class ToolCall(RequestPart):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(RequestPart):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, BeforeValidator(_parse_content)] = None
    name: str | None = Field(None, description="Taken, and not looked at.")
    refusal: None = Field(None, description="As replies have it.")
    tool_calls: list[ToolCall] | None = Field(None, max_length=MAX_TOOLS, description="What an assistant called.")
    tool_call_id: str | None = Field(None, description="The call of which a message of role 'tool' has the result.")

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, message: Any) -> Any:
        return _without(NEUTRAL_OF_MESSAGE, cls, message)

    @model_validator(mode="after")
    def _check_role(self) -> Self:
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls belong to role 'assistant' and to no other")
        if (self.tool_call_id is None) != (self.role != "tool"):
            raise ValueError("tool_call_id belongs to role 'tool' and to no other")
        if self.content is None and self.role != "assistant":  # which may have refused, or called
            raise ValueError("content: field required")
        return self

    def for_template(self) -> dict[str, Any]:
        """As a chat template takes it."""
        message: dict[str, Any] = {"role": self.role.replace("developer", "system"), "content": self.content or ""}
        if self.tool_calls:
            calls = [call.model_dump() for call in self.tool_calls]
            for call in calls:
                call["function"]["arguments"] = json.loads(call["function"]["arguments"] or "{}")
            message["tool_calls"] = calls
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message


class ChatRequest(GenerationRequest):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], FailFast(), BeforeValidator(_check_calls)] = Field(
        min_length=1, max_length=MAX_MESSAGES
    )
    max_tokens: int | None = Field(None, ge=1, description="As max_completion_tokens.")
    max_completion_tokens: int | None = Field(None, ge=1, description="Most tokens to generate; all unless given.")
    logprobs: bool = Field(
        False, description="Log-probabilities; streamed, the events come when the text is whole."
    )  # fmt: skip
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="Likeliest tokens named at each place.")
    tools: Annotated[list[Tool], FailFast()] = Field(
        [], max_length=MAX_TOOLS, description="Functions that the model may call."
    )
    tool_choice: Literal["none", "auto", "required"] | NamedTool = Field(
        "auto",
        description="Whether it calls none, any or one that it must; a call that it must make follows its schema.",
    )
    parallel_tool_calls: bool = Field(
        True,
        description="Whether there may be several calls; false ends the reply with the first. One that must be is one.",
    )

    @property
    def offered_tools(self) -> list[Tool]:
        return [] if self.tool_choice == "none" else self.tools

    @property
    def must_call(self) -> bool:
        return self.tool_choice not in ("none", "auto")

    @model_validator(mode="after")
    def _check_tools(self) -> Self:
        names = [tool.function.name for tool in self.tools]
        if len(set(names)) < len(names):
            raise ValueError("tools: two have one name")
        if self.must_call and not self.tools:
            raise ValueError("tool_choice: found without tools; give the tools of which one must be called")
        if self.offered_tools and self.constrained:
            raise ValueError("tools: found together with response_format or grammar; give one of them")
        return self

    @model_validator(mode="after")
    def _check_consistent(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise ValueError("max_tokens and max_completion_tokens mean the same; give one")
        return self


class RatingRequest(RequestPart):
    """Body of POST /v1/ratings."""

    id: UnicodeText = Field(min_length=1, max_length=64, description="The reply's id.")
    rating: float = Field(ge=-1, le=1, description="From -1, of no use, to 1, very good.")
    comment: UnicodeText = Field("", max_length=4096, description="Why.")
