"""Structured output: a request's JSON schema or grammar, as a grammar that engines decode by."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from llguidance import LLMatcher

from overproof.errors import InputError
from overproof.serve.grammar_process import BYTE_TOKENIZER, LARK
from overproof.serve.requests import MAX_GRAMMAR_CHARACTERS, GenerationRequest

# A small model may otherwise write spaces until it has no token left.
COMPACT_JSON = {"x-guidance": {"whitespace_flexible": False}}
COUNT_KEYWORDS = ("minItems", "maxItems", "minProperties", "maxProperties", "minLength", "maxLength")
MAX_REPEATS = 100_000  # of COUNT_KEYWORDS; with more, llama.cpp is busy for long, and every slot waits


@dataclass(frozen=True)
class GrammarSource:
    """A grammar as a request has it, in llama.cpp's GBNF or llguidance's Lark, and the field that it comes from."""

    field: str
    text: str


def request_grammar(request: GenerationRequest) -> GrammarSource | None:
    """The grammar of a request, None where any text will do.

    Raises:
        InputError: the schema is too large, or both it and a grammar are given.
    """
    response_format = request.response_format
    if response_format.type == "text":
        return None if request.grammar is None else GrammarSource("grammar", request.grammar.lstrip())
    if request.grammar is not None:
        raise InputError("grammar: found together with response_format; give one of the two")
    schema = response_format.json_schema.json_schema if response_format.json_schema else {"type": "object"}
    encoded = json.dumps(COMPACT_JSON | schema)
    check_size("response_format", encoded)
    check_counts("response_format", schema)
    return GrammarSource("response_format", f"{LARK} {{}}\nstart: %json {encoded}")


class GrammarChecker:
    """Checks that a text follows its grammar: llama.cpp drops one that becomes too complex while it decodes."""

    def __init__(self, grammar: str) -> None:
        """Compile a grammar in Lark, which may take long."""
        self._matcher = LLMatcher(BYTE_TOKENIZER, grammar, log_level=0)

    def copy(self) -> GrammarChecker:
        """One at the same place, which shares what is compiled."""
        copied = object.__new__(GrammarChecker)
        copied._matcher = self._matcher.deep_copy()
        return copied

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
