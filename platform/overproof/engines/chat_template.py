"""The chat template of a model, rendered where it can do no harm. How it writes a call of a tool is found by having it
write one: there is no list of models here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

from overproof.data.chat_template_files import require_default, template_files
from overproof.engines import template_process
from overproof.engines.base import ToolSyntax
from overproof.engines.gguf_tokens import GgufHeader
from overproof.engines.special_names import SpecialNames
from overproof.errors import InputError
from overproof.limited_process import LimitedProcess, NoAnswer, OverLimits

CPU_S = 0.5  # to write a text; most take a thousandth of it
MEMORY_BYTES = 256 << 20
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
TOLD_TOKENS = ("bos_token", "eos_token")
USER = {"role": "user", "content": "?"}
CALL = {"id": CALL_ID, "type": "function", "function": {"name": NAME, "arguments": ARGUMENTS}}


class TemplateRenderer:
    """Renders chat templates in a process that may be lost, in training as in every engine."""

    def __init__(self, wall_s: float = 30.0) -> None:
        self._process = LimitedProcess(Path(template_process.__file__), CPU_S, MEMORY_BYTES, wall_s)

    def render(self, template: str, variables: Mapping[str, Any], has_tools: bool = False) -> dict[str, Any]:
        """What ``template_process.answer`` says; an ``error`` where the template takes too much, too.

        A template may call ``documents`` what is None: nobody gives any.
        """
        question = {"template": template, "variables": {"documents": None, **variables}, "has_tools": has_tools}
        try:
            found: dict[str, Any] = self._process.ask(question)
        except OverLimits:
            found = {"error": f"it takes more than {CPU_S:g} s or {MEMORY_BYTES >> 20} MiB for them"}
        except NoAnswer:
            raise RuntimeError("the chat template's process was given no CPU") from None
        return found

    def close(self) -> None:
        """End the process that renders."""
        self._process.close()


def require_renderable(template: str, where: object, mend: str) -> None:
    """Look whether a chat template writes a user's message, and reads nothing that engines do not tell it: asked before
    anything is trained.

    Raises:
        InputError: it does not; the message ends with how to ``mend`` it.
    """
    renderer = TemplateRenderer()
    variables = {"messages": [USER], "tools": None, "add_generation_prompt": True, "bos_token": "", "eos_token": ""}
    found = renderer.render(template, variables)
    renderer.close()
    if "error" in found:
        raise InputError(
            f"{where}: the chat template does not take a conversation of one user's message: {found['error']}; "
            f"expected one that does: {mend}"
        )
    untold = [name for name in found["names"] if name.endswith("_token") and name not in TOLD_TOKENS]
    if untold:
        raise InputError(
            f"{where}: the chat template reads {', '.join(untold)}, which no engine tells it; expected "
            f"{' and '.join(TOLD_TOKENS)} alone, or the token's name as text: {mend}"
        )


def require_default_template(given: str | None, directory: str | None) -> None:
    """Look whether the chat template that files get works: the one given, or that of a model's directory, if any.

    Raises:
        InputError: it does not, or it is not clear which is meant.
    """
    if given is not None:
        require_renderable(given, "compress.chat_template", "change it")
    elif directory is not None:
        template = require_default(template_files(directory), directory)
        if template is not None:
            require_renderable(template, directory, "give another as compress.chat_template")


def require_chat_template(header: GgufHeader, where: object) -> None:
    """Look whether the chat template of a file, if it has one, writes a user's message.

    Raises:
        InputError: it does not.
    """
    if header.chat_template is None:
        return
    template = GgufChatTemplate(header)
    try:
        template.render([USER])
    except InputError as error:
        problem = str(error).removeprefix("messages: ")
        raise InputError(
            f"{where}: {problem}; expected a template that writes a conversation of one user's message: give another "
            "as compress.chat_template"
        ) from None
    finally:
        template.close()


class GgufChatTemplate:
    """The chat template of a GGUF file."""

    def __init__(self, header: GgufHeader) -> None:
        self._header, self._special = header, SpecialNames(header.silent_names)
        self._renderer = TemplateRenderer()

    def render(self, messages: Messages, tools: Sequence[Mapping[str, Any]] = (), to_answer: bool = True) -> str:
        """Messages as a prompt, which asks for the assistant's next one unless that is there already. Names of special
        tokens that stand in them are marked: see ``SpecialNames``.

        Raises:
            InputError: there is no template, it does not take these messages or takes too long over them, or it knows
                no tools where there are any.
        """
        has_tools = bool(tools) or any(message["role"] == "tool" or "tool_calls" in message for message in messages)
        variables = {
            "messages": [_marked(message, self._special) for message in messages],
            "tools": self._special.marked(list(tools)) or None,
            "add_generation_prompt": to_answer,
            # Without a start token that every prompt gets later.
            "bos_token": "" if self._header.start_ids else self._header.bos_token,
            "eos_token": self._header.eos_token,
        }
        template = self._header.require_chat_template()
        found = self._renderer.render(template, variables, has_tools)
        if "error" in found:
            raise InputError(f"messages: the model's chat template does not take them: {found['error']}")
        if has_tools and not found["knows_tools"]:
            raise InputError("tools: the model's chat template knows none; leave them out, and messages of tools too")
        text: str = found["text"]
        return text

    def close(self) -> None:
        """End the process that renders."""
        self._renderer.close()

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


def _marked(message: Mapping[str, Any], special: SpecialNames) -> dict[str, Any]:
    """All of a message but its role, which is the template's own word."""
    return {name: value if name == "role" else special.marked(value) for name, value in message.items()}
