"""Records of every shape as conversations, and what is refused, by file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from overproof.errors import InputError
from overproof.tasks.chat import JsonlConversations, ParquetConversations
from overproof.tasks.conversations import Conversation, conversation, read_conversations

ASKED, ANSWERED = "Add 2 to 3.\n\nin full", "five"
OPENAI = {"messages": [{"role": "user", "content": ASKED}, {"role": "assistant", "content": ANSWERED}]}
SHAREGPT = {"conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": ANSWERED}]}
ALPACA = {"instruction": "Add 2 to 3.", "input": "in full", "output": ANSWERED}
PARTS = {"messages": [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in OPENAI["messages"]]}


def read(folder: Path, records: list[Any], kind: str) -> list[Conversation]:
    path = folder / f"chats.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, records)) + "\n\n")
        return list(read_conversations(JsonlConversations(path=str(path))))
    pq.write_table(pa.Table.from_pylist(records), path)
    return list(read_conversations(ParquetConversations(path=str(folder))))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("record", [OPENAI, SHAREGPT, ALPACA, PARTS], ids=["openai", "sharegpt", "alpaca", "parts"])
def test_every_shape_says_the_same(record: Any, kind: str, tmp_path: Path) -> None:
    (found,) = read(tmp_path, [record], kind)
    assert list(found.messages) == OPENAI["messages"]
    assert found.learnt == (False, True)
    assert found.sha256 == conversation("", OPENAI).sha256
    assert found.where == str(tmp_path / f"chats.{kind}") + (", line 1" if kind == "jsonl" else ", row 1")


def test_system_several_turns_and_tools_are_kept() -> None:
    schema = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    called = {"role": "assistant", "content": None, "tool_calls": [
        {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 3}'}}]}  # fmt: skip
    openai = conversation("", {"tools": [schema], "messages": [
        {"role": "developer", "content": "be short"}, {"role": "user", "content": "2+3?"}, called,
        {"role": "tool", "tool_call_id": "c1", "content": "5"}, {"role": "assistant", "content": "five"},
        {"role": "user", "content": "thanks"},
    ]})  # fmt: skip
    assert [m["role"] for m in openai.messages] == ["system", "user", "assistant", "tool", "assistant", "user"]
    call = openai.messages[2]["tool_calls"][0]
    assert call == {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 3}}}
    assert openai.messages[3]["tool_call_id"] == "c1"
    assert openai.tools == (schema,)
    sharegpt = conversation("", {"system": "be short", "tools": json.dumps([schema]), "conversations": [
        {"from": "human", "value": "2+3?"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
        {"from": "observation", "value": "5"}, {"from": "gpt", "value": "five"},
    ]})  # fmt: skip
    assert [m["role"] for m in sharegpt.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert sharegpt.messages[2]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 2}}
    assert sharegpt.tools == openai.tools
    alpaca = conversation("", {**ALPACA, "system": "be short", "history": [["hi", "hello"]]})
    assert [m["content"] for m in alpaca.messages] == ["be short", "hi", "hello", ASKED, ANSWERED]


def test_a_message_of_weight_0_is_not_learnt() -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0},
             {"role": "user", "content": "c"}, {"role": "assistant", "content": "d", "weight": 1}]  # fmt: skip
    found = conversation("", {"messages": turns})
    assert found.learnt == (False, False, False, True)
    assert all("weight" not in message for message in found.messages)


def test_one_question_is_one_whatever_its_spaces_case_and_system() -> None:
    def asked(text: str, system: str) -> str:
        turns = [{"role": "system", "content": system}, {"role": "user", "content": text}]
        return conversation("", {"messages": [*turns, {"role": "assistant", "content": text}]}).prompt_sha256

    assert asked("What is it?", "a") == asked("what  is it? ", "b") != asked("what is that?", "a")


def turns(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": "x"} for role in roles]}


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (turns("user", "assistant", "assistant"), "message 3 is the assistant's, and message 2 is the assistant's, too;"
         " expected a user's or a tool's before each"),
        (turns("assistant", "user"), "message 1 is the assistant's, and nothing stands before it"),
        (turns("system", "user"), "found messages of system, user alone; expected one of the assistant's"),
        (turns("user", "narrator"), "message 2: role is 'narrator'; expected one of system, developer, user"),
        ({"conversations": [{"from": "bing", "value": "x"}]}, "message 1: from is 'bing'; expected one of"),
        ({"text": "x", "id": 1}, "found the keys id, text; expected an object with messages (a list of role and"),
        (["x"], "found ['x']; expected an object with messages"),
        ({"messages": "x"}, "'messages' holds 'x'; expected a list of messages"),
        ({"messages": []}, "'messages' holds []; expected a list of messages"),
        ({"messages": ["x"]}, "message 1: found 'x'; expected an object with role and content"),
        ({"messages": [{"text": "x"}]}, "message 1: found the keys text; expected role and content, or from and value"),
        ({"messages": [{"role": "user", "content": 3}]}, "message 1: its content is 3; expected a string"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "of type 'image_url'; expected text"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "half of a UTF-16 pair"),
        ({"instruction": "x", "output": " "}, "message 2: the assistant says nothing; expected text or tool_calls"),
        ({"instruction": "x", "output": "y", "history": ["z"]}, "'history' holds ['z']; expected pairs"),
        ({"messages": [*turns("user")["messages"], {"role": "assistant", "content": "y", "weight": 2}]},
         "message 2: weight is 2; expected 0 or 1"),
        ({"messages": [*turns("user")["messages"], {"role": "assistant", "content": "y", "weight": 0}]},
         "expected one of the assistant's of weight 1 at least"),
        ({"messages": [*turns("user")["messages"], {"role": "assistant", "tool_calls": [{"id": "1"}]}]},
         "message 2: tool_calls holds {'id': '1'}; expected a function with name and arguments"),
        ({"conversations": [{"from": "human", "value": "x"}, {"from": "function_call", "value": "add"}]},
         "message 2: a function_call holds 'add'; expected JSON with name and arguments"),
        ({**turns("user", "assistant"), "tools": "add"}, "tools holds 'add'; expected a list of JSON schemas"),
    ],
)  # fmt: skip
def test_what_is_no_conversation_is_refused_by_its_line(record: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as refused:
        read(tmp_path, [OPENAI, record], "jsonl")
    assert str(refused.value).startswith(f"{tmp_path}/chats.jsonl, line 2: ")
    assert words in str(refused.value)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    source = JsonlConversations(path=str(tmp_path))
    with pytest.raises(InputError, match=r"none of its 0 entries matches \*\.jsonl"):
        list(read_conversations(source))
    for content, words in ((b'{"a": 1}\n{"a":', "line 2: not JSON"), (b'{"a": "\xff"}', "line 1: not UTF-8")):
        (tmp_path / "x.jsonl").write_bytes(content)
        with pytest.raises(InputError, match="found the keys a" if content.startswith(b'{"a": 1}') else words):
            list(read_conversations(source))
    (tmp_path / "x.jsonl").write_bytes(json.dumps(OPENAI).encode() + b'\n{"a":\n')
    with pytest.raises(InputError, match="line 2: not JSON"):
        list(read_conversations(source))
    (tmp_path / "x.parquet").write_bytes(b"no")
    with pytest.raises(InputError, match="not Parquet"):
        list(read_conversations(ParquetConversations(path=str(tmp_path))))
