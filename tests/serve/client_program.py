"""What users of OpenAI's package, LiteLLM and LangChain do; run by an environment that has them, against a server.

Prints a JSON object: of each thing that was tried, what came of it, or the error.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # which it would fetch
warnings.simplefilter("ignore")

import litellm  # noqa: E402
import openai  # noqa: E402
from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage  # noqa: E402
from langchain_core.tools import tool  # noqa: E402
from langchain_openai import ChatOpenAI  # noqa: E402
from langchain_openai import OpenAI as CompletionOpenAI  # noqa: E402
from pydantic import BaseModel  # noqa: E402

litellm.suppress_debug_info = True
MODEL, URL = "stdlib-lm", sys.argv[1]
HERE: Any = {"base_url": URL, "api_key": "none", "max_retries": 0}
LITE: Any = {"model": f"openai/{MODEL}", "api_base": URL, "api_key": "none"}
ASK: Any = [{"role": "system", "content": "Write."}, {"role": "user", "content": "hi"}]
MORE: Any = {"role": "user", "content": "more"}
LONG: Any = [{"role": "user", "content": "x" * 9999}]
ON = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"], "additionalProperties": False}
SWITCH: Any = {"type": "function", "function": {"name": "switch", "parameters": ON}}
client = openai.OpenAI(**HERE)


class Answer(BaseModel):
    ok: bool


@tool
def switch(on: bool) -> str:
    """Switch it."""
    return "done"


def chat(messages: Any = ASK, **more: Any) -> Any:
    return client.chat.completions.create(model=MODEL, messages=messages, **{"max_tokens": 4, **more})


def lite(messages: Any = ASK, **more: Any) -> Any:
    return litellm.completion(messages=messages, **LITE, **{"max_tokens": 4, **more})


def langchain(**more: Any) -> ChatOpenAI:
    return ChatOpenAI(model=MODEL, **HERE, **{"max_tokens": 4, **more})


def replayed(ask: Callable[..., Any]) -> bool:
    """Its own message comes back, as the object and as a dictionary."""
    message = ask().choices[0].message
    return bool(ask([*ASK, message, MORE]).choices and ask([*ASK, message.model_dump(), MORE]).choices)


def called(ask: Callable[..., Any]) -> Any:
    """A call of a tool, and its result sent back."""
    message = ask(tools=[SWITCH], tool_choice="required", max_tokens=64, seed=1).choices[0].message
    (call,) = message.tool_calls
    result = {"role": "tool", "tool_call_id": call.id, "content": "done"}
    for said in (message, message.model_dump()):
        ask([*ASK, said, result], tools=[SWITCH])
    return sorted(json.loads(call.function.arguments))


def neutral() -> bool:
    return bool(
        chat(
            store=False, metadata={"a": "b"}, parallel_tool_calls=True, service_tier="auto", user="u", logit_bias={},
            seed=-1, top_p=0, stop=None, logprobs=False, modalities=["text"], reasoning_effort=None, verbosity=None,
            safety_identifier="s", prompt_cache_key="k", tools=[], functions=[], n=1, stream_options=None,
        ).choices
    )  # fmt: skip


def overflow() -> Any:
    try:
        chat(LONG)
    except openai.BadRequestError as error:
        return error.code
    return None


def lite_overflow() -> str:
    try:
        lite(LONG)
    except litellm.ContextWindowExceededError as error:
        return type(error).__name__
    return ""


def lite_fall_back() -> Any:
    larger = {**LITE, "mock_response": "from the larger"}
    models = [{"model_name": "small", "litellm_params": LITE}, {"model_name": "large", "litellm_params": larger}]
    router = litellm.Router(model_list=models, context_window_fallbacks=[{"small": ["large"]}], num_retries=0)
    return router.completion(model="small", messages=LONG).choices[0].message.content


def langchain_overflow() -> bool:
    try:
        langchain().invoke(LONG)
    except openai.BadRequestError as error:
        return "ContextOverflow" in type(error).__name__
    return False


def langchain_called() -> Any:
    bound = langchain(max_tokens=64, seed=1).bind_tools([switch], tool_choice="required", strict=True)
    asked: Any = [SystemMessage("s"), HumanMessage("hi")]
    message: Any = bound.invoke(asked)
    (call,) = message.tool_calls
    chunks = list(bound.stream(asked))
    streamed: Any = sum(chunks[1:], chunks[0])
    for each in (message, streamed):
        result = ToolMessage("done", tool_call_id=each.tool_calls[0]["id"])
        langchain().bind_tools([switch]).invoke([*asked, each, result])
    return sorted(call["args"]) if call["args"] == streamed.tool_calls[0]["args"] else [call, streamed.tool_calls]


def langchain_replayed() -> bool:
    asked: Any = [SystemMessage("s"), HumanMessage("hi")]
    chunks = list(langchain(stream_usage=True).stream(asked))
    for said in (langchain().invoke(asked), sum(chunks[1:], chunks[0])):
        langchain().invoke([*asked, said, HumanMessage("more")])
    return True


def joined(events: Any) -> bool:
    return any(event.choices and event.choices[0].delta.content for event in events)


USAGE: Any = {"stream": True, "stream_options": {"include_usage": True}}
TRIED: dict[str, Callable[[], Any]] = {
    "openai: its message comes back": lambda: replayed(chat),
    "openai: a tool is called": lambda: called(chat),
    "openai: what asks for nothing": neutral,
    "openai: a stream": lambda: joined(chat(**USAGE)),
    "openai: a model of pydantic": lambda: client.chat.completions.parse(
        model=MODEL, messages=ASK, response_format=Answer, max_tokens=64, seed=1
    ).choices[0].message.parsed.ok in (True, False),
    "openai: a prompt that is too long": overflow,
    "litellm: its message comes back": lambda: replayed(lite),
    "litellm: a tool is called": lambda: called(lite),
    "litellm: a stream": lambda: joined(lite(**USAGE)),
    "litellm: a completion": lambda: bool(litellm.text_completion(
        model=f"text-completion-openai/{MODEL}", prompt="x", max_tokens=4, api_base=URL, api_key="none").choices),
    "litellm: as a vLLM": lambda: bool(
        litellm.completion(**{**LITE, "model": f"hosted_vllm/{MODEL}"}, messages=ASK, max_tokens=4).choices),
    "litellm: a model of pydantic": lambda: set(json.loads(
        lite(response_format=Answer, max_tokens=64, seed=1).choices[0].message.content)) == {"ok"},
    "litellm: seeds, top_p, metadata": lambda: bool(lite(seed=-1, top_p=0, user="u", metadata={"a": "b"}).choices),
    "litellm: a prompt that is too long": lite_overflow,
    "litellm: falls back to a larger model": lite_fall_back,
    "langchain: its message comes back": langchain_replayed,
    "langchain: a tool is called": langchain_called,
    "langchain: a model of pydantic": lambda: langchain(max_tokens=64, seed=1).with_structured_output(
        Answer, method="json_schema", strict=True).invoke("hi").ok in (True, False),
    "langchain: choices, seeds, log-probabilities": lambda: len(langchain(
        n=2, seed=-1, top_p=0, temperature=0, stop=["zz"], logprobs=True, top_logprobs=2
    ).generate([[HumanMessage("hi")]]).generations[0]),
    "langchain: completions": lambda: len(CompletionOpenAI(model=MODEL, **HERE, max_tokens=4).batch(["hi", "ho"])),
    "langchain: a prompt that is too long": langchain_overflow,
}  # fmt: skip


def attempt(what: Callable[[], Any]) -> Any:
    try:
        return what()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


print(json.dumps({name: attempt(what) for name, what in TRIED.items()}))
