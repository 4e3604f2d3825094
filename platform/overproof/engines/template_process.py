"""Renders chat templates, which come with downloaded models, in a ``LimitedProcess``: imports nothing of the package.

As Hugging Face runs them: https://huggingface.co/docs/transformers/chat_templating says what a template is given.
"""

from __future__ import annotations

import json
from datetime import datetime
from functools import cache
from typing import Any

from jinja2 import Template, TemplateError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_CHARACTERS = 16 << 20  # of a text; no model reads as much


class _GenerationTag(Extension):
    """``{% generation %}`` marks what the assistant wrote, which rendering has no use for."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """The text of ``messages`` by a ``template``, and whether it knows tools, where there are any; or what is wrong."""
    try:
        template, knows_tools = _compile(question["template"])
        if question["has_tools"] and not knows_tools:
            return {"text": "", "knows_tools": False}
        text = template.render(**question["variables"])
    except RecursionError:
        return {"error": "it calls itself, or is nested, too deep"}
    except Exception as error:  # a template may do anything to what it is given
        return {"error": str(error) or type(error).__name__}
    if len(text) > MAX_CHARACTERS:
        return {"error": f"it writes {len(text)} characters; expected at most {MAX_CHARACTERS}"}
    return {"text": text, "knows_tools": knows_tools}


@cache
def _compile(source: str) -> tuple[Template, bool]:
    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag]
    )
    sandbox.globals["raise_exception"] = _raise_template_error
    sandbox.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    sandbox.filters["tojson"] = _to_json
    return sandbox.from_string(source), "tools" in meta.find_undeclared_variables(sandbox.parse(source))


def _to_json(value: Any, indent: int | None = None, **settings: Any) -> str:
    """Jinja's own writes for HTML, and sorts."""
    return json.dumps(value, **{"ensure_ascii": False, "indent": indent, **settings})


def _raise_template_error(message: str) -> None:
    raise TemplateError(message)
