"""What a request asks its text to be, as a grammar that the engine keeps to."""

from __future__ import annotations

import json

from llguidance import LLMatcher

from overproof.errors import InputError
from overproof.serve.schema import MOST_GRAMMAR, Generated

LARK = "%llguidance"  # how a grammar in llguidance's language begins
COMPACT = {"x-guidance": {"whitespace_flexible": False}}  # a small model may write spaces until it has no token left


def grammar_of(request: Generated) -> str | None:
    """The grammar, None where any text will do. llama.cpp drops one that llguidance cannot read: it is read here first.

    Raises:
        InputError: the schema or the grammar is too large or cannot be kept to, or both are given.
    """
    wanted = request.response_format
    if wanted.type == "text":
        if request.grammar is not None and request.grammar.lstrip().startswith(LARK):
            _check("grammar", request.grammar)
        return request.grammar
    if request.grammar is not None:
        raise InputError("grammar: found beside response_format; give one of the two")
    asked = wanted.json_schema.json_schema if wanted.json_schema else {"type": "object"}
    schema = json.dumps(COMPACT | asked)
    if len(schema) > MOST_GRAMMAR:
        raise InputError(f"response_format: a schema of {len(schema)} characters; expected at most {MOST_GRAMMAR}")
    grammar = f"{LARK} {{}}\nstart: %json {schema}"
    _check("response_format", grammar)
    return grammar


def _check(field: str, grammar: str) -> None:
    fault = LLMatcher.validate_grammar(grammar)
    if fault:
        raise InputError(f"{field}: {fault.splitlines()[0].partition(': ')[2]}")
