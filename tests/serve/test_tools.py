"""Tools in chats: offered by the model's own template, called by grammar or found in its text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from test_http import ask

from overproof.engines.base import Piece, ToolSyntax
from overproof.engines.chat_template import GgufChatTemplate
from overproof.engines.gguf_tokens import GgufHeader, read_gguf_header
from overproof.engines.llamacpp import LlamaCpp
from overproof.errors import InputError
from overproof.export.gguf_file import export_gguf
from overproof.serve.middleware import Access
from overproof.serve.routes import build_app
from overproof.serve.tools import ToolCallParser, ToolPart
from single_model import listening, one

# As the templates of Qwen 2.5 and of others who follow Nous Research's Hermes.
HERMES = """
{%- if tools %}
    {{- "<|system|>\\nTools:" }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "<|endoftext|>\\n" }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "tool" %}
        {{- "<|user|>\\n<tool_response>\\n" + message.content + "\\n</tool_response><|endoftext|>\\n" }}
    {%- elif message.tool_calls %}
        {{- "<|assistant|>" }}
        {%- if message.content %}{{- "\\n" + message.content }}{%- endif %}
        {%- for call in message.tool_calls %}
            {{- '\\n<tool_call>\\n{"name": "' }}{{- call.function.name }}
            {{- '", "arguments": ' }}{{- call.function.arguments | tojson }}{{- "}\\n</tool_call>" }}
        {%- endfor %}
        {{- "<|endoftext|>\\n" }}
    {%- else %}
        {{- "<|" + message.role + "|>\\n" + message.content + "<|endoftext|>\\n" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|assistant|>\\n" }}{%- endif %}
"""
# As that of Llama 3.1, which marks a call by nothing but its JSON.
LLAMA = """
{%- if tools is not none %}{{- tools | tojson(indent=4) }}{%- endif %}
{%- for message in messages %}
    {%- if "tool_calls" in message %}
        {%- set call = message.tool_calls[0].function %}
        {{- '#assistant\\n{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}{{- "}<|endoftext|>" }}
    {%- else %}
        {{- "#" + message.role + "\\n" + (message.content | trim) + "<|endoftext|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- "#assistant\\n" }}{%- endif %}
"""
XML = """{{ tools }}
{% for m in messages %}{{ m.content }}{% for c in m.tool_calls %}<{{ c.function.name }}/>{% endfor %}{% endfor %}
"""
SYNTAX = ToolSyntax('<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>")


def tool(name: str, properties: dict[str, Any]) -> Any:
    schema = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": "It's <b>", "parameters": schema}}


WEATHER = tool(
    "weather", {"city": {"enum": ["Bern", 'Köln {"}']}, "days": {"type": "integer", "minimum": 1, "maximum": 9}}
)
SWITCH = tool("switch", {"on": {"type": "boolean"}})
ASK: Any = [{"role": "user", "content": "import os"}]


@pytest.fixture(scope="module")
def header(text_package: Path) -> GgufHeader:
    return read_gguf_header(text_package / "model.gguf")


def template(header: GgufHeader, text: str) -> GgufChatTemplate:
    return GgufChatTemplate(GgufHeader(**{**vars(header), "chat_template": text}))


@pytest.fixture(scope="module")
def engine(text_package: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaCpp]:
    """The package's model with a template that knows tools."""
    (student,) = text_package.parent.glob("sweep-*/students/student")
    file = tmp_path_factory.mktemp("tools") / "model.gguf"
    export_gguf(student, text_package / "tokenizer.json", file, format="q8_0", name="tools", chat_template=HERMES)
    made = LlamaCpp(file, slots=2)
    yield made
    made.close()


@pytest.fixture(scope="module")
def client(text_package: Path, engine: LlamaCpp) -> Iterator[OpenAI]:
    with (
        listening(build_app(one(text_package, engine, max_tokens=96), Access(None))) as url,
        OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def test_a_call_is_written_as_the_template_writes_it(header: GgufHeader) -> None:
    assert template(header, HERMES).tool_syntax == SYNTAX
    assert template(header, LLAMA).tool_syntax == ToolSyntax('{"name": "', '", "parameters": ', "}")
    silent = LLAMA.replace("#assistant\\n{", "#assistant\\n<|endoftext|>{")
    assert silent != LLAMA
    assert template(header, silent).tool_syntax == template(header, LLAMA).tool_syntax
    with pytest.raises(InputError, match=r"tools: .* otherwise than as a name followed by arguments in JSON"):
        _ = template(header, XML).tool_syntax


def test_tools_and_their_turns_are_written_by_the_template(engine: LlamaCpp) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}
    messages = [*ASK, {"role": "assistant", "content": "", "tool_calls": [call]}]
    messages += [{"role": "tool", "content": "5°", "tool_call_id": "c"}]
    assert engine.chat_prompt(messages, [SWITCH]) == (
        f"<|system|>\nTools:\n{json.dumps(SWITCH)}<|endoftext|>\n<|user|>\nimport os<|endoftext|>\n"
        '<|assistant|>\n<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call><|endoftext|>\n'
        "<|user|>\n<tool_response>\n5°\n</tool_response><|endoftext|>\n<|assistant|>\n"
    )


@pytest.mark.parametrize("named", [None, "switch", "weather"])
def test_a_call_that_is_asked_for_follows_its_schema(client: OpenAI, named: str | None) -> None:
    choice: Any = {"type": "function", "function": {"name": named}} if named else "required"
    arguments: Any = {"model": "stdlib-lm", "messages": ASK, "tools": [WEATHER, SWITCH], "tool_choice": choice}
    arguments |= {"seed": 0, "n": 4}
    whole = client.chat.completions.create(**arguments)
    for each in whole.choices:
        (call,) = each.message.tool_calls or ()
        assert (each.finish_reason, each.message.content, call.type) == ("tool_calls", None, "function")
        assert call.type == "function"
        found = json.loads(call.function.arguments)
        assert call.function.name in ([named] if named else ["switch", "weather"])
        if call.function.name == "switch":
            assert found in ({"on": True}, {"on": False})
        else:
            assert set(found) == {"city", "days"}
            assert found["city"] in ("Bern", 'Köln {"}')
            assert found["days"] in range(1, 10)
    ids = [call.id for each in whole.choices for call in each.message.tool_calls or ()]
    assert len(set(ids)) == 4
    events = list(client.chat.completions.create(**arguments, stream=True))
    for each in whole.choices:
        mine = [event.choices[0] for event in events if event.choices[0].index == each.index]
        deltas = [call for event in mine for call in event.delta.tool_calls or ()]
        assert [delta.index for delta in deltas] == [0] * len(deltas)
        assert [delta.id is None for delta in deltas] == [False] + [True] * (len(deltas) - 1)
        assert not any(event.delta.content for event in mine)
        (call,) = each.message.tool_calls or ()
        names = [delta.function.name for delta in deltas if delta.function and delta.function.name]
        assert names == [call.function.name]
        joined = "".join(delta.function.arguments or "" for delta in deltas if delta.function)
        assert joined == call.function.arguments
        assert [event.finish_reason for event in mine] == [None] * (len(mine) - 1) + ["tool_calls"]


def test_a_strict_tool_and_one_without_parameters(client: OpenAI) -> None:
    """Arguments are those of the schema, or none at all, `strict` or not."""
    strict = {**SWITCH, "function": {**SWITCH["function"], "strict": True}}
    for bare in ({"name": "stop_it"}, {"name": "stop_it", "strict": True}, {"name": "stop_it", "description": "x"}):
        tools: Any = [strict, {"type": "function", "function": bare}]
        for named, allowed in (("switch", [{"on": True}, {"on": False}]), ("stop_it", [{}])):
            choice: Any = {"type": "function", "function": {"name": named}}
            reply = client.chat.completions.create(
                model="stdlib-lm", messages=ASK, tools=tools, tool_choice=choice, seed=1, parallel_tool_calls=False
            )
            (call,) = reply.choices[0].message.tool_calls or ()
            assert call.type == "function"
            assert (call.function.name, reply.choices[0].finish_reason) == (named, "tool_calls")
            assert json.loads(call.function.arguments) in allowed
    auto = client.chat.completions.create(model="stdlib-lm", messages=ASK, tools=tools, max_tokens=4)
    assert auto.usage
    assert auto.usage.completion_tokens <= 4


@pytest.mark.parametrize("reason", ["stop", "length"])
@pytest.mark.parametrize(("parallel", "count"), [(True, 2), (False, 1)])
def test_calls_that_may_not_be_several_are_one(text_package: Path, parallel: bool, count: int, reason: str) -> None:
    """Over HTTP, whole and streamed, of an engine that writes two and some text; the first is whole in any case."""
    text = f"Let me see.{call('switch', ODD)}\n{call('weather', '{}')} and so on"
    app = build_app(one(text_package, Writes(text, reason)), Access(None))
    arguments: Any = {"model": "stdlib-lm", "messages": ASK, "tools": [WEATHER, SWITCH]}
    arguments |= {"parallel_tool_calls": parallel, "tool_choice": "auto"}
    with listening(app) as url, OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        (choice,) = client.chat.completions.create(**arguments).choices
        events = [event.choices[0] for event in client.chat.completions.create(**arguments, stream=True)]
    expected = [("switch", ODD), ("weather", "{}")][:count]
    found = [each.function for each in choice.message.tool_calls or () if each.type == "function"]
    assert [(each.name, each.arguments) for each in found] == expected
    content = "Let me see. and so on" if parallel else "Let me see."
    assert choice.message.content == content
    assert "".join(event.delta.content or "" for event in events) == content
    deltas = [each.function for event in events for each in event.delta.tool_calls or () if each.function]
    assert [each.name for each in deltas if each.name] == [name for name, _ in expected]
    assert "".join(each.arguments or "" for each in deltas) == "".join(made for _, made in expected)
    ends = "tool_calls" if reason == "stop" or not parallel else "length"
    assert (choice.finish_reason, events[-1].finish_reason) == (ends, ends)


def test_a_reply_goes_back_into_the_chat_as_the_client_has_it(client: OpenAI) -> None:
    arguments: Any = {"model": "stdlib-lm", "tools": [SWITCH]}
    message = client.chat.completions.create(**arguments, messages=ASK, tool_choice="required").choices[0].message
    (call,) = message.tool_calls or ()
    messages = [*ASK, message, {"role": "tool", "tool_call_id": call.id, "content": [{"type": "text", "text": "done"}]}]
    after = client.chat.completions.create(**arguments, messages=messages, max_tokens=4, seed=0)
    assert after.choices[0].message.tool_calls is None
    assert after.choices[0].message.content
    assert after.usage
    assert after.usage.prompt_tokens > 100


def test_without_a_choice_to_call_tools_are_not_offered(client: OpenAI) -> None:
    arguments: Any = {"model": "stdlib-lm", "messages": ASK, "max_tokens": 4, "temperature": 0}
    none = client.chat.completions.create(**arguments, tools=[SWITCH], tool_choice="none")
    assert none.usage == client.chat.completions.create(**arguments).usage
    auto = client.chat.completions.create(**arguments, tools=[SWITCH])
    assert auto.usage
    assert none.usage
    assert auto.usage.prompt_tokens > none.usage.prompt_tokens


class Writes:
    """An engine that writes a given text, some characters at a time."""

    def __init__(self, text: str, reason: Any = "stop") -> None:
        self.text, self.reason = text, reason

    def chat_prompt(self, *_: Any) -> str:
        return "x"

    def tool_syntax(self) -> ToolSyntax:
        return SYNTAX

    def stream(self, *_: Any) -> Any:
        pieces = [Piece(self.text[at : at + 3]) for at in range(0, len(self.text), 3)]
        return Pieces([*pieces, Piece("", self.reason, 1, 9)])


class Pieces:
    def __init__(self, pieces: list[Piece]) -> None:
        self.pieces = iter(pieces)
        self.prompt_tokens, self.completion_tokens = 1, 9

    def __iter__(self) -> Pieces:
        return self

    def __next__(self) -> Piece:
        return next(self.pieces)

    def close(self) -> None: ...


def call(name: str, arguments: str) -> str:
    return SYNTAX.before_name + name + SYNTAX.before_arguments + arguments + SYNTAX.after


ODD = '{"a": "}\\"{", "b": [{"c": 1}, "\\\\"]}'
WRITTEN: list[tuple[str, str, list[tuple[str, str]]]] = [  # text, content, calls
    ("plain", "plain", []),
    ("", "", []),
    (f"Let me see.\n{call('switch', ODD)}", "Let me see.\n", [("switch", ODD)]),
    (f"{call('switch', ODD)}\n{call('weather', '{}')}\n", "", [("switch", ODD), ("weather", "{}")]),
    (f"{call('switch', '{}')} and so on", " and so on", [("switch", "{}")]),
    (call("nosuch", "{}"), call("nosuch", "{}"), []),
    (call("switch", "[]"), call("switch", "[]"), []),
    (call("switch", "{}")[:20], call("switch", "{}")[:20], []),
    (f"<tool_call>{call('switch', '{}')}", "<tool_call>", [("switch", "{}")]),
    (call("switch", '{"on": tr')[: -len(SYNTAX.after)], "", [("switch", '{"on": tr')]),
]


@pytest.mark.parametrize(("text", "content", "calls"), WRITTEN)
def test_calls_are_found_in_what_a_model_writes(
    text_package: Path, text: str, content: str, calls: list[tuple[str, str]]
) -> None:
    app = build_app(one(text_package, Writes(text)), Access(None))
    body: Any = {"messages": ASK, "tools": [WEATHER, SWITCH]}
    (choice,) = ask(app, "POST", "/v1/chat/completions", json=body).json()["choices"]
    message = choice["message"]
    found = [each["function"] for each in message["tool_calls"] or ()]
    assert [(each["name"], each["arguments"]) for each in found] == calls
    assert (message["content"], choice["finish_reason"]) == (
        (content or None, "tool_calls") if calls else (content, "stop")
    )
    lines = ask(app, "POST", "/v1/chat/completions", json=body | {"stream": True}).text.split("\n\n")
    events = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines if line.startswith('data: {"')]
    assert "".join(event["delta"]["content"] or "" for event in events) == content
    streamed = list[list[str]]()
    for delta in (each for event in events for each in event["delta"]["tool_calls"] or ()):
        if delta["id"]:
            assert delta["index"] == len(streamed)
            streamed.append([delta["function"]["name"], ""])
        streamed[delta["index"]][1] += delta["function"]["arguments"]
    assert [tuple(each) for each in streamed] == calls
    assert events[-1]["finish_reason"] == choice["finish_reason"]


def test_a_call_that_is_cut_off_says_so(text_package: Path) -> None:
    app = build_app(one(text_package, Writes(call("switch", '{"on"')[:-15], "length")), Access(None))
    (choice,) = ask(app, "POST", "/v1/chat/completions", json={"messages": ASK, "tools": [SWITCH]}).json()["choices"]
    assert choice["finish_reason"] == "length"


def test_text_is_held_back_only_while_it_may_begin_a_call() -> None:
    parser = ToolCallParser(SYNTAX, ["switch"])
    assert parser.add("a <") == [ToolPart("a ")]
    assert parser.add("b") == [ToolPart("<b")]
    assert parser.add('<tool_call>\n{"name": "switch", "arguments": ') == []
    assert parser.add('{"on": ') == [ToolPart(name="switch"), ToolPart(arguments="{"), ToolPart(arguments='"on": ')]
    assert parser.add("true}}\n</tool") == [ToolPart(arguments="true}")]
    assert parser.add("_call>\n") == []
    assert parser.finish() == []


def turn(arguments: str) -> Any:
    return {"id": "c", "function": {"name": "x", "arguments": arguments}}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"tools": [{"type": "function"}]}, "field required"),
    ({"tools": [tool("a b", {})]}, "should match pattern"),
    ({"tools": [SWITCH, SWITCH]}, "two have one name"),
    ({"tools": [tool("x", {"y": {"type": "nope"}})], "tool_choice": "required"}, "Invalid type: nope"),
    ({"tools": [tool("x", {"y": {"type": "array", "minItems": 10**9}})], "tool_choice": "required"}, "minItems"),
    ({"tools": [tool("x", {"y": {"enum": ["x" * 17000]}})], "tool_choice": "required"}, "at most 16384"),
    ({"tool_choice": "required"}, "without tools"),
    ({"tools": [SWITCH], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "one of tools: switch"),
    ({"tools": [SWITCH], "tool_choice": "any"}, "'none', 'auto' or 'required'"),
    ({"tools": [SWITCH], "response_format": {"type": "json_object"}}, "together with response_format"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "tool_call_id belongs"),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [turn("")]}]}, "tool_calls belong"),
    ({"messages": [{"role": "assistant", "tool_calls": [turn("[]")]}]}, "expected a JSON object"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "message"), REFUSED)
def test_a_bad_request_gets_one_clear_error(client: OpenAI, body: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        client.chat.completions.create(**{"model": "stdlib-lm", "messages": ASK, **body})


def test_a_template_that_knows_no_tools_is_not_given_any(text_package: Path) -> None:
    engine = LlamaCpp(text_package / "model.gguf")
    app = build_app(one(text_package, engine), Access(None))
    turn = {"role": "tool", "content": "5", "tool_call_id": "c"}
    for body in ({"messages": ASK, "tools": [SWITCH]}, {"messages": [*ASK, turn]}):
        reply = ask(app, "POST", "/v1/chat/completions", json=body)
        assert reply.status_code == 400
        assert "the model's chat template knows none" in reply.json()["error"]["message"]
    reply = ask(app, "POST", "/v1/chat/completions", json={"messages": ASK, "tools": [SWITCH], "tool_choice": "none"})
    assert reply.status_code == 200
    engine.close()
