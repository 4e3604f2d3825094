"""Tools in chats: the grammar of a call that is asked for, and calls found in the text that a model writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from overproof.engines.base import ToolSyntax
from overproof.errors import InputError
from overproof.serve.grammar import COMPACT_JSON, GrammarSource, check_counts, check_size
from overproof.serve.grammar_process import LARK
from overproof.serve.requests import Tool


def call_grammar(syntax: ToolSyntax, tools: Sequence[Tool]) -> GrammarSource:
    """The grammar of one call of one of these tools, whose arguments follow its schema.

    Raises:
        InputError: a schema is too large.
    """
    rules = []
    for number, tool in enumerate(tools):
        schema = json.dumps(COMPACT_JSON | {"type": "object"} | tool.function.parameters)
        before = json.dumps(syntax.before_name + tool.function.name + syntax.before_arguments)
        rules.append(f"call_{number}: {before} arguments_{number}{_literal(syntax.after)}")
        rules.append(f"arguments_{number}: %json {schema}")
    calls = " | ".join(f"call_{number}" for number in range(len(tools)))
    grammar = "\n".join([f"{LARK} {{}}", f"start: {calls}", *rules])
    check_size("tools", grammar)
    check_counts("tools", [tool.function.parameters for tool in tools])
    return GrammarSource("tools", grammar)


def _literal(text: str) -> str:
    return f" {json.dumps(text)}" if text else ""


@dataclass(frozen=True)
class ToolPart:
    """Part of a reply: text, or the begin of a call, which has a name, or the next part of its arguments."""

    text: str = ""
    name: str | None = None
    arguments: str = ""


class ToolCallParser:
    """Splits what a model writes, part by part, into text and calls of the tools that it was offered.

    A call counts from its first brace on: what comes before is held back until it is known to be one, or none. Where
    ``one_call`` at most is wanted, the reply is over with it: whatever follows is left out.
    """

    def __init__(self, syntax: ToolSyntax, names: Sequence[str], one_call: bool = False) -> None:
        self._syntax, self._one_call = syntax, one_call
        self._beginnings = {name: syntax.before_name + name + syntax.before_arguments for name in names}
        self._held = ""
        self._depth, self._in_string, self._escaped = 0, False, False  # of the arguments that are being read
        self._ended = False  # a call whose closing text may follow
        self.called = False
        self.is_over = False  # whether nothing that follows counts

    def add(self, text: str) -> list[ToolPart]:
        """Take the next part of the text; give what is known of it."""
        found = list[ToolPart]()
        if self.is_over:
            return found
        self._held += text
        while self._held and (parts := self._next()) is not None:
            found += parts
        return found

    def finish(self) -> list[ToolPart]:
        """What was held back; call it when no more text follows."""
        held, self._held = self._held, ""
        is_closing = self._ended or (self.called and not held.strip())
        return [] if is_closing or not held else [ToolPart(held)]

    def _next(self) -> list[ToolPart] | None:
        """Take something from what is held; None where more must follow first."""
        if self._depth:
            arguments = self._take_arguments()
            if self._ended and self._one_call:
                self._held, self.is_over = "", True
            return [ToolPart(arguments=arguments)]
        if self._ended:
            after = self._syntax.after
            if len(self._held) < len(after) and after.startswith(self._held):
                return None
            self._held, self._ended = self._held.removeprefix(after), False
            return []
        at = self._held.find(self._syntax.before_name)
        if at < 0:
            return self._take_text(len(self._held) - self._may_begin())
        if at > 0:
            return self._take_text(at)
        for name, beginning in self._beginnings.items():
            if self._held.startswith(beginning + "{"):
                self._held, self._depth, self.called = self._held[len(beginning) + 1 :], 1, True
                return [ToolPart(name=name), ToolPart(arguments="{")]
            if (beginning + "{").startswith(self._held):
                return None
        return self._take_text(1)

    def _take_text(self, count: int) -> list[ToolPart] | None:
        """So many characters as text; white space between calls is none."""
        text = self._held[:count]
        is_space_after_call = self.called and not text.strip()
        if not text or (is_space_after_call and count == len(self._held)):
            return None
        self._held = self._held[count:]
        return [] if is_space_after_call else [ToolPart(text)]

    def _may_begin(self) -> int:
        """How many characters at the end may be the begin of a call."""
        marker = self._syntax.before_name
        longest = min(len(self._held), len(marker) - 1)
        return next((n for n in range(longest, 0, -1) if marker.startswith(self._held[-n:])), 0)

    def _take_arguments(self) -> str:
        """Up to the brace that closes them, or all."""
        end = len(self._held)
        for place, character in enumerate(self._held):
            if self._in_string:
                self._in_string = self._escaped or character != '"'
                self._escaped = character == "\\" and not self._escaped
            elif character == '"':
                self._in_string = True
            else:
                self._depth += (character in "{[") - (character in "}]")
                if not self._depth:
                    self._ended, end = True, place + 1
                    break
        taken, self._held = self._held[:end], self._held[end:]
        return taken


def require_tools(tools: Sequence[Tool], choice: str | None) -> list[Tool]:
    """The tools of which one must be called: all, or the one that is chosen by its name.

    Raises:
        InputError: none has that name.
    """
    chosen = [tool for tool in tools if choice in (None, tool.function.name)]
    if not chosen:
        names = ", ".join(tool.function.name for tool in tools)
        raise InputError(f"tool_choice: found function {choice!r}; expected one of tools: {names}")
    return chosen
