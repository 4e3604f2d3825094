"""Structured output: a request's JSON schema or grammar, as a grammar that engines decode by."""

from __future__ import annotations

import json
from typing import Any

from llguidance import LLMatcher, LLTokenizer
from llguidance.gbnf_to_lark import gbnf_to_lark

from overproof.errors import InputError
from overproof.serve.requests import MAX_GRAMMAR_CHARACTERS, GenerationRequest

LARK = "%llguidance"  # how a grammar in llguidance's language begins
# A small model may otherwise write spaces until it has no token left.
COMPACT_JSON = {"x-guidance": {"whitespace_flexible": False}}
COUNT_KEYWORDS = ("minItems", "maxItems", "minProperties", "maxProperties", "minLength", "maxLength")
MAX_REPEATS = 100_000  # of COUNT_KEYWORDS; with more, llama.cpp is busy for long, and every slot waits
BYTE_TOKENIZER = LLTokenizer("byte")


def request_grammar(request: GenerationRequest) -> str | None:
    """The grammar of a request, None where any text will do. Validated here, for llama.cpp ignores one that llguidance
    cannot read.

    Raises:
        InputError: the schema or the grammar is too large or invalid, or both are given.
    """
    response_format = request.response_format
    if response_format.type == "text":
        return None if request.grammar is None else _to_lark(request.grammar.lstrip())
    if request.grammar is not None:
        raise InputError("grammar: found together with response_format; give one of the two")
    schema = response_format.json_schema.json_schema if response_format.json_schema else {"type": "object"}
    encoded = json.dumps(COMPACT_JSON | schema)
    check_size("response_format", encoded)
    check_counts("response_format", schema)
    grammar = f"{LARK} {{}}\nstart: %json {encoded}"
    validate_grammar("response_format", grammar)
    return grammar


def _to_lark(text: str) -> str:
    """A grammar in llguidance's Lark, for llama.cpp's own grammar engine takes seconds for some small GBNF."""
    try:
        lark = text if text.startswith(LARK) else str(gbnf_to_lark(text))
    except Exception as error:  # the converter raises bare ones
        raise InputError(f"grammar: {error}; expected GBNF whose first rule is root") from None
    validate_grammar("grammar", lark)
    return lark


def validate_grammar(field: str, grammar: str) -> None:
    """Refuse what llguidance cannot read, or cannot begin.

    Raises:
        InputError: it cannot; the field is to blame.
    """
    problem = LLMatcher.validate_grammar(grammar)
    if not problem:
        matcher = LLMatcher(BYTE_TOKENIZER, grammar, log_level=0)
        allowed = next((token for token, bias in enumerate(matcher.compute_logit_bias()) if bias), None)
        if allowed is not None:
            matcher.consume_token(allowed)
        problem = matcher.get_error()  # endless recursion or too many alternatives show at the first token
    if problem:
        first = problem.splitlines()[0]
        raise InputError(f"{field}: {first.partition(': ')[2] or first}")


class GrammarChecker:
    """Checks that a text follows its grammar: llama.cpp drops one that becomes too complex while it decodes."""

    def __init__(self, grammar: str) -> None:
        self._matcher = LLMatcher(BYTE_TOKENIZER, grammar, log_level=0)

    def add(self, text: str) -> None:
        """Take the next part of the text.

        Raises:
            InputError: the grammar does not allow it.
        """
        if text and not (self._matcher.consume_tokens(list(text.encode())) or self._matcher.is_accepting()):
            raise InputError("grammar: too complex for the engine, which dropped it; expected a simpler one")


def check_size(field: str, schema: str) -> None:
    """Refuse a schema that is too long.

    Raises:
        InputError: it is.
    """
    if len(schema) > MAX_GRAMMAR_CHARACTERS:
        raise InputError(f"{field}: a schema of {len(schema)} characters; expected at most {MAX_GRAMMAR_CHARACTERS}")


def check_counts(field: str, part: Any) -> None:
    """Refuse counts in a schema that are too large.

    Raises:
        InputError: one is.
    """
    parts = [part]
    while parts:
        part = parts.pop()
        if isinstance(part, list):
            parts += part
        elif isinstance(part, dict):
            parts += part.values()
            for name in COUNT_KEYWORDS:
                if isinstance(part.get(name), int) and part[name] > MAX_REPEATS:
                    raise InputError(f"{field}: {name} of {part[name]}; expected at most {MAX_REPEATS}")
