"""What a request asks its text to be, as a grammar that the engine keeps to."""

from __future__ import annotations

import json
from typing import Any

from llguidance import LLMatcher, LLTokenizer
from llguidance.gbnf_to_lark import gbnf_to_lark

from overproof.errors import InputError
from overproof.serve.requests import MOST_GRAMMAR, GenerationRequest

LARK = "%llguidance"  # how a grammar in llguidance's language begins
COMPACT = {"x-guidance": {"whitespace_flexible": False}}  # a small model may write spaces until it has no token left
COUNTS = ("minItems", "maxItems", "minProperties", "maxProperties", "minLength", "maxLength")
MOST_REPEATS = 100_000  # of what a schema counts; llama.cpp is long busy with more, and every slot with it
BYTES = LLTokenizer("byte")


def grammar_of(request: GenerationRequest) -> str | None:
    """The grammar, None where any text will do. llama.cpp drops one that llguidance cannot read: it is read here first.

    Raises:
        InputError: the schema or the grammar is too large or cannot be kept to, or both are given.
    """
    wanted = request.response_format
    if wanted.type == "text":
        return None if request.grammar is None else _lark(request.grammar.lstrip())
    if request.grammar is not None:
        raise InputError("grammar: found beside response_format; give one of the two")
    asked = wanted.json_schema.json_schema if wanted.json_schema else {"type": "object"}
    schema = json.dumps(COMPACT | asked)
    if len(schema) > MOST_GRAMMAR:
        raise InputError(f"response_format: a schema of {len(schema)} characters; expected at most {MOST_GRAMMAR}")
    _check_counts(asked)
    grammar = f"{LARK} {{}}\nstart: %json {schema}"
    _check("response_format", grammar)
    return grammar


def _lark(text: str) -> str:
    """A grammar in llguidance's language; llama.cpp's own engine takes seconds for some small GBNF."""
    try:
        lark = text if text.startswith(LARK) else str(gbnf_to_lark(text))
    except Exception as error:  # of any class: the converter raises a bare one too
        raise InputError(f"grammar: {error}; expected GBNF whose first rule is root") from None
    _check("grammar", lark)
    return lark


def _check(field: str, grammar: str) -> None:
    fault = LLMatcher.validate_grammar(grammar)
    if not fault:
        matcher = LLMatcher(BYTES, grammar, log_level=0)
        allowed = next((token for token, bias in enumerate(matcher.compute_logit_bias()) if bias), None)
        if allowed is not None:
            matcher.consume_token(allowed)
        fault = matcher.get_error()  # a reference to itself, or more choices than are kept, show at the first token
    if fault:
        first = fault.splitlines()[0]
        raise InputError(f"{field}: {first.partition(': ')[2] or first}")


class GrammarChecker:
    """Holds a text against its grammar: llama.cpp goes on without one that becomes too complex on the way."""

    def __init__(self, grammar: str) -> None:
        self._matcher = LLMatcher(BYTES, grammar, log_level=0)

    def add(self, text: str) -> None:
        """Take the next part of the text.

        Raises:
            InputError: it is not what the grammar allows.
        """
        if text and not (self._matcher.consume_tokens(list(text.encode())) or self._matcher.is_accepting()):
            raise InputError("grammar: too complex for the engine, which does not keep to it; expected a simpler one")


def _check_counts(part: Any) -> None:
    parts = [part]
    while parts:
        part = parts.pop()
        if isinstance(part, list):
            parts += part
        elif isinstance(part, dict):
            parts += part.values()
            for name in COUNTS:
                if isinstance(part.get(name), int) and part[name] > MOST_REPEATS:
                    raise InputError(f"response_format: {name} of {part[name]}; expected at most {MOST_REPEATS}")
