"""A chat template, written in Jinja as Hugging Face runs it, where tools are offered or called.

https://huggingface.co/docs/transformers/chat_templating says what a template is given. How it writes a call of a tool
is found by having it write one: there is no list of models here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from itertools import takewhile
from typing import Any

from jinja2 import Template, TemplateError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from overproof.engines.base import ToolSyntax
from overproof.engines.gguf_tokens import GgufHeader
from overproof.errors import InputError

Messages = Sequence[Mapping[str, Any]]
NAME, TEXT, CALL_ID = "probed_function", "¤probed text¤", "probed123"
ARGUMENTS = {"probed_argument": "probed_value"}
TOOL = {
    "type": "function",
    "function": {
        "name": NAME,
        "description": "",
        "parameters": {"type": "object", "properties": {name: {"type": "string"} for name in ARGUMENTS}},
    },
}
USER = {"role": "user", "content": "?"}
CALL = {"id": CALL_ID, "type": "function", "function": {"name": NAME, "arguments": ARGUMENTS}}


class _GenerationTag(Extension):
    """``{% generation %}`` marks what the assistant wrote, which rendering has no use for."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class GgufChatTemplate:
    """The chat template of a GGUF file."""

    def __init__(self, header: GgufHeader) -> None:
        self._header = header

    def render(self, messages: Messages, tools: Sequence[Mapping[str, Any]] = (), to_answer: bool = True) -> str:
        """Messages as a prompt, which asks for the assistant's next one unless that is there already.

        Raises:
            InputError: there is no template, it does not take these messages, or it knows no tools where there are any.
        """
        has_tools = tools or any(message["role"] == "tool" or "tool_calls" in message for message in messages)
        if has_tools and not self._knows_tools:
            raise InputError("tools: the model's chat template knows none; leave them out, and messages of tools too")
        try:
            return self._template.render(
                messages=list(messages),
                tools=list(tools) or None,
                add_generation_prompt=to_answer,
                # Without a start token that every prompt gets later.
                bos_token="" if self._header.start_ids else self._header.bos_token,
                eos_token=self._header.eos_token,
            )
        except (TemplateError, TypeError, ValueError, LookupError) as error:
            raise InputError(f"messages: the model's chat template does not take them: {error}") from None

    @cached_property
    def tool_syntax(self) -> ToolSyntax:
        """How the template writes an assistant's call of a tool.

        Raises:
            InputError: it knows no tools, or writes no JSON, or marks no beginning of it.
        """
        said = self.render([USER, {"role": "assistant", "content": TEXT}], [TOOL], to_answer=False)
        called = self.render(
            [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}], [TOOL], to_answer=False
        )
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(said, called, strict=False)))
        before_name, _, rest = called[same:].partition(NAME)
        before_name = self._visible(before_name)
        start = rest.find("{")
        try:
            arguments, end = json.JSONDecoder().raw_decode(rest, start)
        except ValueError:
            arguments, end = None, 0
        if start < 0 or arguments != ARGUMENTS or not before_name:
            raise InputError(
                "tools: the model's chat template writes calls otherwise than as a name followed by arguments in JSON; "
                "leave tools out"
            )
        after = rest[end:].removesuffix(said.partition(TEXT)[2]).partition(self._header.eos_token)[0]
        return ToolSyntax(before_name, self._visible(rest[:start]), self._visible(after))

    def _visible(self, text: str) -> str:
        """Without the names of tokens that add nothing to a text: no engine shows them."""
        for name in self._header.silent_names.values():
            text = text.replace(name, "") if name else text
        return text

    @cached_property
    def _environment(self) -> ImmutableSandboxedEnvironment:
        sandbox = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag]
        )
        sandbox.globals["raise_exception"] = _raise_template_error
        sandbox.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        sandbox.filters["tojson"] = _to_json
        return sandbox

    @cached_property
    def _template(self) -> Template:
        return self._environment.from_string(self._header.require_chat_template())

    @cached_property
    def _knows_tools(self) -> bool:
        parsed = self._environment.parse(self._header.require_chat_template())
        return "tools" in meta.find_undeclared_variables(parsed)


def _to_json(value: Any, indent: int | None = None, **settings: Any) -> str:
    """Jinja's own writes for HTML, and sorts."""
    return json.dumps(value, **{"ensure_ascii": False, "indent": indent, **settings})


def _raise_template_error(message: str) -> None:
    raise TemplateError(message)
