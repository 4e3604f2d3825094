"""Conversations as people keep them, read into messages of one shape: what chat templates take.

A record is OpenAI's (``messages`` of ``role`` and ``content``, with ``tools`` beside), ShareGPT's (``conversations`` of
``from`` and ``value``), or has Alpaca's columns (``instruction``, ``input``, ``output``). What its last answer must be,
where it is a question of the test split, stands beside as ``expected``.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pyarrow import fs

from overproof.data.json_lines import read_json_lines
from overproof.data.parquet_columns import PARQUET, iter_columns, open_parquet
from overproof.data.source_files import (
    FileListing,
    OnError,
    SourceFile,
    SourceReading,
    list_suffix,
    naming_faults,
    open_content,
)
from overproof.errors import InputError
from overproof.files import filesystem
from overproof.tasks.expected_answers import Expected, read_expected

Message = dict[str, Any]

# What is read of a record.
KEYS = ("messages", "conversations", "instruction", "input", "output", "history", "system", "tools", "expected")
ASSISTANT, CALL = "assistant", "function_call"
ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", ASSISTANT: ASSISTANT, "gpt": ASSISTANT,
    CALL: ASSISTANT, "tool": "tool", "function": "tool", "observation": "tool",
}  # fmt: skip
SHAPES = (
    "messages (a list of role and content), conversations (a list of from and value), or instruction, input and output"
)
SHOWN = 60  # characters of what was found


@dataclass(frozen=True)
class Conversation:
    """Messages of the roles system, user, assistant and tool; each of the assistant's follows another's."""

    where: str  # file, and line or row
    messages: tuple[Message, ...]
    learnt: tuple[bool, ...]  # of each message: whether a model is to learn it; the assistant's alone are
    tools: tuple[dict[str, Any], ...] | None
    expected: Expected | None = None  # of the last answer that is learnt

    @cached_property
    def sha256(self) -> str:
        """Of all but what is expected, in hex."""
        return _digest([self.messages, self.learnt, self.tools])

    @property
    def last_answer(self) -> int:
        """The number of the last message that is learnt."""
        return max(number for number, is_learnt in enumerate(self.learnt) if is_learnt)

    @property
    def said(self) -> str:
        """What user, assistant and tools say and what is called, without the system's words."""
        own = [message for message in self.messages if message["role"] != "system"]
        calls = (call["function"] for message in own for call in message.get("tool_calls", ()))
        return "\n".join([*(message["content"] for message in own), *map(json.dumps, calls)])

    @cached_property
    def prompt_sha256(self) -> str:
        """Of what was asked before the first answer, apart from the system's words where there are others, whatever its
        case and white space: conversations that have it in common belong into one split."""
        first = next(i for i, message in enumerate(self.messages) if message["role"] == ASSISTANT)
        asked = [m for m in self.messages[:first] if m["role"] != "system"] or self.messages[:first]
        return _digest([" ".join(message["content"].split()).casefold() for message in asked])


def conversation_files(source: Any, on_error: OnError = "fail") -> FileListing:
    """The files of a source.

    Raises:
        InputError: there are none.
    """
    return list_suffix(source.path, f".{source.kind}", on_error)


def read_conversations(source: Any, found: SourceReading | None = None) -> Iterator[Conversation]:
    """Every conversation of a source, in the order of files and records; of those that were ``found`` there, if given.

    Raises:
        InputError: a record is no conversation; it says where, what was found and what was expected.
    """
    reading = found or SourceReading(conversation_files(source))
    files, _ = filesystem(source.path)
    records = _lines if source.kind == "jsonl" else _rows

    def read(file: SourceFile) -> Iterator[Conversation]:
        for where, record in records(files, reading.listing.path(file), reading):
            yield conversation(where, record)

    yield from reading.each_file(read)


def conversation(where: str, record: Any) -> Conversation:
    """One record.

    Raises:
        InputError: as ``read_conversations``.
    """
    if not isinstance(record, dict):
        raise InputError(f"{where}: found {_shown(record)}; expected an object with {SHAPES}")
    given = {key: value for key, value in record.items() if value is not None}
    turns = _turns(where, given)
    if isinstance(given.get("system"), str) and given["system"] and _role_of(turns[0]) != "system":
        turns = [{"role": "system", "content": given["system"]}, *turns]
    messages, learnt = list[Message](), list[bool]()
    for number, turn in enumerate(turns, start=1):
        message, is_learnt = _message(f"{where}: message {number}", turn)
        if message["role"] == ASSISTANT and (not messages or messages[-1]["role"] == ASSISTANT):
            before = "nothing stands before it" if not messages else f"message {number - 1} is the assistant's, too"
            raise InputError(
                f"{where}: message {number} is the assistant's, and {before}; expected a user's or a tool's before "
                "each of the assistant's"
            )
        messages.append(message)
        learnt.append(is_learnt)
    if not any(learnt):
        roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
        weighed = " of weight 1" if any(message["role"] == ASSISTANT for message in messages) else ""
        raise InputError(
            f"{where}: found messages of {roles} alone; expected one of the assistant's{weighed} at least: models "
            "learn these"
        )
    expected = read_expected(where, given.get("expected"))
    return Conversation(where, tuple(messages), tuple(learnt), _tools(where, given.get("tools")), expected)


# --- the shapes of records ------------------------------------------------------------------------


def _turns(where: str, record: Mapping[str, Any]) -> list[Any]:
    for name in ("messages", "conversations"):
        if name in record:
            turns = record[name]
            if not isinstance(turns, list) or not turns:
                raise InputError(f"{where}: {name!r} holds {_shown(turns)}; expected a list of messages")
            return turns
    if "instruction" in record and "output" in record:
        asked = record["instruction"]
        if isinstance(asked, str) and isinstance(record.get("input"), str) and record["input"]:
            asked = f"{asked}\n\n{record['input']}"
        history = record.get("history") or []
        if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in history):
            raise InputError(f"{where}: 'history' holds {_shown(history)}; expected pairs of question and answer")
        pairs = [*history, (asked, record["output"])]
        return [
            {"role": role, "content": text}
            for pair in pairs
            for role, text in zip(("user", ASSISTANT), pair, strict=True)
        ]
    found = ", ".join(sorted(record)) or "none"
    raise InputError(f"{where}: found the keys {found}; expected an object with {SHAPES}")


def _role_of(turn: Any) -> str | None:
    return ROLES.get(str(turn.get("role", turn.get("from")))) if isinstance(turn, dict) else None


def _message(where: str, turn: Any) -> tuple[Message, bool]:
    """A message as templates take it, and whether a model is to learn it."""
    if not isinstance(turn, dict):
        raise InputError(f"{where}: found {_shown(turn)}; expected an object with role and content, or from and value")
    given = {key: value for key, value in turn.items() if value is not None}
    named, held = ("from", "value") if "from" in given and "role" not in given else ("role", "content")
    if named not in given:
        found = ", ".join(sorted(given)) or "none"
        raise InputError(f"{where}: found the keys {found}; expected role and content, or from and value")
    role = ROLES.get(given[named]) if isinstance(given[named], str) else None
    if role is None:
        raise InputError(f"{where}: {named} is {_shown(given[named])}; expected one of {', '.join(ROLES)}")
    content = _content(where, given.get(held))
    message = {key: value for key, value in given.items() if key not in (named, held, "weight", "tool_calls")}
    calls = _called(where, content) if given[named] == CALL else _calls(where, given.get("tool_calls"))
    message |= {"role": role, "content": "" if given[named] == CALL else content}
    if calls:
        message["tool_calls"] = calls
    if role == ASSISTANT and not calls and not content.strip():
        raise InputError(f"{where}: the assistant says nothing; expected text or tool_calls: leave the record out")
    weight = given.get("weight", 1)
    if weight not in (0, 1):
        raise InputError(f"{where}: weight is {_shown(weight)}; expected 0 or 1, which says whether models learn it")
    return message, role == ASSISTANT and bool(weight)


def _content(where: str, content: Any) -> str:
    if isinstance(content, list):  # of parts, as OpenAI's API has it
        kinds = [part.get("type") if isinstance(part, dict) else type(part).__name__ for part in content]
        if other := [kind for kind in kinds if kind != "text"]:
            raise InputError(f"{where}: a part of its content is of type {other[0]!r}; expected text alone")
        content = "".join(str(part.get("text") or "") for part in content)
    if content is None:
        return ""
    if not isinstance(content, str):
        raise InputError(f"{where}: its content is {_shown(content)}; expected a string")
    if any("\ud800" <= character <= "\udfff" for character in content):
        raise InputError(f"{where}: its content holds half of a UTF-16 pair; expected valid Unicode")
    return content


def _calls(where: str, calls: Any) -> list[dict[str, Any]]:
    """Tool calls, their arguments as objects: templates write these as JSON themselves."""
    if calls is None:
        return []
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InputError(f"{where}: tool_calls holds {_shown(call)}; expected a function with name and arguments")
        arguments = _json(function.get("arguments") or {})
        kept = {key: value for key, value in call.items() if key == "id" and value is not None}
        found.append(kept | {"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return found


def _called(where: str, content: str) -> list[dict[str, Any]]:
    """The call that ShareGPT's ``function_call`` writes as JSON."""
    call = _json(content)
    if not isinstance(call, dict):
        raise InputError(f"{where}: a {CALL} holds {_shown(content)}; expected JSON with name and arguments")
    return _calls(where, [call])


def _tools(where: str, tools: Any) -> tuple[dict[str, Any], ...] | None:
    found = _json(tools)
    if found in (None, "", []):
        return None
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise InputError(f"{where}: tools holds {_shown(tools)}; expected a list of JSON schemas of functions")
    return tuple(found)


def _json(value: Any) -> Any:
    """A value that may have been written as JSON into a string."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


# --- files ----------------------------------------------------------------------------------------


def _lines(files: fs.FileSystem, path: str, reading: SourceReading) -> Iterator[tuple[str, Any]]:
    with naming_faults(path, "JSON Lines"), open_content(files, path) as stream:
        yield from read_json_lines(io.BufferedReader(stream), path, reading)


def _rows(files: fs.FileSystem, path: str, reading: SourceReading) -> Iterator[tuple[str, Any]]:
    del reading
    with naming_faults(path, PARQUET), files.open_input_file(path) as handle:
        names = open_parquet(handle).schema_arrow.names
        known = [name for name in KEYS if name in names]
        if not known:
            raise InputError(f"{path}: found the columns {', '.join(names) or 'none'}; expected {SHAPES}")
        row = 0
        for batch in iter_columns(handle, path, known):
            for record in batch.to_pylist():
                row += 1
                yield f"{path}, row {row}", record


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True, default=str).encode()).hexdigest()


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
