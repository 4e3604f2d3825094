"""Reads the grammars of requests, in a ``LimitedProcess``: imports nothing of the package."""

from __future__ import annotations

from typing import Any

from llguidance import LLMatcher, LLTokenizer
from llguidance.gbnf_to_lark import gbnf_to_lark

LARK = "%llguidance"  # how a grammar in llguidance's language begins
BYTE_TOKENIZER = LLTokenizer("byte")


def answer(text: str) -> dict[str, Any]:
    """A grammar as Lark, compiled and with a first token taken; or what is wrong.

    GBNF becomes Lark, for llama.cpp's own grammar engine takes seconds for some small GBNF.
    """
    try:
        lark = text if text.startswith(LARK) else str(gbnf_to_lark(text))
    except Exception as error:  # the converter raises bare ones
        return {"error": f"{error}; expected GBNF whose first rule is root"}
    problem = LLMatcher.validate_grammar(lark)
    if not problem:
        matcher = LLMatcher(BYTE_TOKENIZER, lark, log_level=0)
        allowed = next((token for token, bias in enumerate(matcher.compute_logit_bias()) if bias), None)
        if allowed is not None:
            matcher.consume_token(allowed)
        problem = matcher.get_error()  # endless recursion or too many alternatives show at the first token
    if problem:
        first = problem.splitlines()[0]
        return {"error": first.partition(": ")[2] or first}
    return {"lark": lark}
