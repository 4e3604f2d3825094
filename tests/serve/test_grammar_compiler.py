"""Grammars that take the server's time or memory: each is refused, and others go on meanwhile."""

from __future__ import annotations

import asyncio
import os
import resource
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from overproof.errors import InputError
from overproof.serve.async_engine import Busy
from overproof.serve.grammar import GrammarSource, request_grammar
from overproof.serve.grammar_compiler import MAX_WAITING, PROCESSES, GrammarCompiler
from overproof.serve.requests import CompletionRequest


def source(schema: dict[str, Any]) -> GrammarSource:
    response_format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    found = request_grammar(CompletionRequest.model_validate({"prompt": "x", "response_format": response_format}))
    assert found is not None
    return found


def run(work: Callable[[GrammarCompiler], Coroutine[Any, Any, None]]) -> None:
    async def with_compiler() -> None:
        compiler = GrammarCompiler()
        try:
            await work(compiler)
        finally:
            await compiler.close()

    asyncio.run(with_compiler())


ENUM = {"enum": ["yes", "no"]}
HOSTILE = {
    "a multiple of a large number": {"type": "integer", "multipleOf": 99_999_999},
    "several of them": {"anyOf": [{"type": "integer", "multipleOf": 40_009 + 2 * i} for i in range(40)]},
    "one of a property of a list": {
        "type": "array",
        "items": {"type": "object", "properties": {"a": {"type": "number", "multipleOf": 7777.7777}}},
    },
}


@pytest.mark.parametrize("schema", HOSTILE.values(), ids=HOSTILE.keys())
def test_what_takes_too_much_is_refused_and_others_are_compiled_meanwhile(schema: dict[str, Any]) -> None:
    async def work(compiler: GrammarCompiler) -> None:
        attack = asyncio.ensure_future(compiler.compile(source(schema), 1))
        grammar = await compiler.compile(source(ENUM), 16)
        grammar.checker().add('"yes"')
        with pytest.raises(InputError, match="response_format: "):
            await attack
        with pytest.raises(InputError, match="response_format: "):  # remembered
            await compiler.compile(source(schema), 1)
        assert (await compiler.compile(source({"const": 1}), 1)).lark

    run(work)


def test_the_choices_of_a_request_share_a_limit() -> None:
    """For the engine compiles it anew for each of them."""
    large = source({"type": "integer", "multipleOf": 20_011})

    async def work(compiler: GrammarCompiler) -> None:
        (await compiler.compile(large, 1)).checker().add("40022")
        with pytest.raises(InputError, match=r"response_format: takes .* s to compile for each of 64 choices"):
            await compiler.compile(large, 64)

    run(work)


def test_invalid_ones_are_told_as_they_are() -> None:
    async def work(compiler: GrammarCompiler) -> None:
        for field, text, message in [
            ("grammar", 'root ::= ("a"', "grammar: .*expected GBNF"),
            ("grammar", 'other ::= "a"', "root"),
            ("response_format", '%llguidance {}\nstart: %json {"type": "nothing"}', "response_format: .*nothing"),
        ]:
            with pytest.raises(InputError, match=message):
                await compiler.compile(GrammarSource(field, text), 1)

    run(work)


def test_each_checker_begins_anew() -> None:
    async def work(compiler: GrammarCompiler) -> None:
        grammar = await compiler.compile(source(ENUM), 1)
        grammar.checker().add('"yes"')
        grammar.checker().add('"no"')
        with pytest.raises(InputError, match="too complex"):
            grammar.checker().add('"maybe"')

    run(work)


def test_a_process_with_many_files_compiles_too() -> None:
    """As a server with as many connections."""

    async def work(compiler: GrammarCompiler) -> None:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, limit[1]), limit[1]))
        held = list[int]()
        try:
            while not held or held[-1] < 1_100:
                held.append(os.open(os.devnull, os.O_RDONLY))
            (await compiler.compile(source(ENUM), 1)).checker().add('"yes"')
        finally:
            for file in held:
                os.close(file)
            resource.setrlimit(resource.RLIMIT_NOFILE, limit)

    run(work)


def test_those_that_wait_are_bounded_and_what_is_given_up_is_ended() -> None:
    async def work(compiler: GrammarCompiler) -> None:
        slow = [source({"type": "integer", "multipleOf": 99_999_989 - i}) for i in range(MAX_WAITING + PROCESSES)]
        attacks = [asyncio.ensure_future(compiler.compile(each, 1)) for each in slow]
        await asyncio.sleep(0)
        with pytest.raises(Busy):
            await compiler.compile(source(ENUM), 1)
        for attack in attacks:
            attack.cancel()
        await asyncio.gather(*attacks, return_exceptions=True)
        (await compiler.compile(source(ENUM), 1)).checker().add('"yes"')

    run(work)
