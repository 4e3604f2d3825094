"""Renders chat templates, which come with downloaded models, in a ``LimitedProcess``: imports nothing of the package.

As Hugging Face runs them: https://huggingface.co/docs/transformers/chat_templating says what a template is given.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from functools import cache
from typing import Any

from jinja2 import Environment, Template, TemplateError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

REASONING = ("reasoning_content", "thinking", "reasoning")  # fields of a message
MAX_CHARACTERS = 16 << 20  # of a text; no model reads as much


class _GenerationTag(Extension):
    """``{% generation %}`` marks what the assistant wrote. What is set inside is not seen outside, as there."""

    tags = {"generation"}  # noqa: RUF012

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        environment.extend(written=[], spans=[])  # the text so far, and the characters of it that are marked

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
        environment: Any = self.environment
        text, start = caller(), len("".join(environment.written))
        environment.spans.append((start, start + len(text)))
        return text


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """The text of ``messages`` by a ``template``, and the characters of it that are marked as the assistant's; whether
    it knows tools, where there are any, and the names that it reads; or what is wrong.
    """
    try:
        template, names = _compile(question["template"])
        knows_tools = "tools" in names
        if question["has_tools"] and not knows_tools:
            return {"text": "", "knows_tools": False, "names": names, "spans": []}
        variables = question["variables"]
        environment: Any = template.environment
        written, spans = environment.written, environment.spans
        written.clear()
        spans.clear()
        for part in template.generate(**{**variables, "messages": _reasoning_by_every_name(variables["messages"])}):
            written.append(part)
        text = "".join(written)
    except RecursionError:
        return {"error": "it calls itself, or is nested, too deep"}
    except Exception as error:  # a template may do anything to what it is given
        return {"error": str(error) or type(error).__name__}
    if len(text) > MAX_CHARACTERS:
        return {"error": f"it writes {len(text)} characters; expected at most {MAX_CHARACTERS}"}
    return {"text": text, "knows_tools": knows_tools, "names": names, "spans": spans}


@cache
def _compile(source: str) -> tuple[Template, list[str]]:
    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag]
    )
    sandbox.globals["raise_exception"] = _raise_template_error
    sandbox.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    sandbox.filters["tojson"] = _to_json
    return sandbox.from_string(source), sorted(meta.find_undeclared_variables(sandbox.parse(source)))


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Jinja's own writes for HTML, and sorts; the order of its settings is transformers'."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _reasoning_by_every_name(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a model thought has had several names: templates find it under each, as transformers has it."""
    found = []
    for message in messages:
        thought = next((message[name] for name in REASONING if message.get(name) is not None), None)
        found.append(message if thought is None else {"thinking": thought, **message, "reasoning_content": thought})
    return found


def _raise_template_error(message: str) -> None:
    raise TemplateError(message)
