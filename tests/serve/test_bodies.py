"""Bodies of which there would be much to make are refused before anything is made of them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fastapi.testclient import TestClient
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from overproof.serve.bodies import LONG_BYTES, MAX_DEPTH, MAX_PARTS, excess
from overproof.serve.middleware import Access
from overproof.serve.requests import MAX_CALLS, MAX_CONTENT_PARTS, MAX_PROMPT_IDS, ChatRequest, CompletionRequest
from overproof.serve.routes import build_app

MANY = {str(number): 1 for number in range(MAX_PARTS)}
CALL = {"id": "a", "type": "function", "function": {"name": "a", "arguments": "{}"}}


class NoModels:
    """A registry that must not be asked."""

    def models(self) -> list[Any]:
        return []

    async def find(self, *_: Any) -> Any:
        raise HTTPException(404, "there is none")


@pytest.mark.parametrize("body", [MANY | {"one": 1}, [[]] * (MAX_PARTS + 1), ["{"] * (MAX_PARTS + 1)])
def test_a_body_of_too_many_parts_is_refused_unread(body: Any) -> None:
    client = TestClient(build_app(NoModels(), Access()), base_url="http://localhost", client=("127.0.0.1", 1))
    reply = client.post("/v1/completions", json=body)
    assert reply.status_code == 413
    assert f"expected {MAX_PARTS} at most" in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    "text", ['{["\\' * 200_000, '"' * (2 * MAX_PARTS + 2), '\\"' * MAX_PARTS, "\\" * 400_001, "{" * 1_000_000]
)
def test_what_stands_in_a_text_counts_as_one(text: str) -> None:
    assert excess(json.dumps({"prompt": text, "stop": [text[:9]]}).encode()) is None


def test_numbers_count_as_none_and_what_is_no_json_as_it_looks() -> None:
    assert excess(json.dumps({"images": [[0.5] * 64] * 1024}).encode()) is None
    assert excess(b'"' * (2 * MAX_PARTS)) is None  # empty texts
    assert "texts, objects and lists" in str(excess(b"[" * (MAX_PARTS + 1)))


@pytest.mark.parametrize("depth", [MAX_DEPTH - 3, 300, 480, 900, 5_000])
def test_what_is_nested_deep_is_refused_wherever_it_stands(depth: int) -> None:
    deep = '{"a":' * depth + "1" + "}" * depth
    tool = '{"type":"function","function":{"name":"f","parameters":' + deep + "}}"
    call = json.dumps({"id": "1", "type": "function", "function": {"name": "f", "arguments": deep}})
    client = TestClient(
        build_app(NoModels(), Access()),
        base_url="http://localhost",
        client=("127.0.0.1", 1),
        raise_server_exceptions=False,
    )
    for body in (
        '{"messages":[{"role":"user","content":"x"}],"tools":[' + tool + "]}",
        '{"messages":[{"role":"assistant","tool_calls":[' + call + "]}]}",
        '{"messages":[{"role":"user","content":"x"}],"metadata":' + deep + "}",
    ):
        reply = client.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
        deepest = depth + 4 if "tools" in body else depth
        assert (reply.status_code in (400, 413)) == (deepest > MAX_DEPTH), reply.text


@pytest.mark.parametrize("length", [10, LONG_BYTES])
def test_of_many_unknown_fields_one_is_told(length: int) -> None:
    many = {f"x{number}": 1 for number in range(length // 6)}
    for body, path in [
        ({"prompt": "x", **many}, ("x0",)),
        ({"prompt": "x", "store": True, "seed": None, **many}, ("x0",)),
        ({"prompt": "x", "stream_options": {"include_usage": True, **many}}, ("stream_options", "x0")),
    ]:
        with pytest.raises(ValidationError) as refused:
            CompletionRequest.model_validate(body)
        assert [(error["type"], error["loc"]) for error in refused.value.errors()] == [("extra_forbidden", path)]
    messages = [{"role": "user", "content": "x", **many}] * 100
    with pytest.raises(ValidationError) as refused:
        ChatRequest.model_validate({"messages": messages})
    assert [error["loc"] for error in refused.value.errors()] == [("messages", 0, "x0")]


@pytest.mark.parametrize(
    ("form", "body", "message"),
    [
        (CompletionRequest, {"prompt": [[1] * (MAX_PROMPT_IDS // 4)] * 5}, "token ids in all prompts"),
        (CompletionRequest, {"prompt": "x", "model": "x" * 1000}, "at most 512"),
        (CompletionRequest, {"prompt": "x", "user": "x" * 1000}, "at most 512"),
        (
            ChatRequest,
            {"messages": [{"role": "assistant", "tool_calls": [CALL] * 100}] * (MAX_CALLS // 100 + 1)},
            "tool_calls: expected at most",
        ),
        (
            ChatRequest,
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * (MAX_CONTENT_PARTS + 1)}]},
            "parts: expected at most",
        ),
    ],
)
def test_lengths_are_bounded(form: Any, body: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        form.model_validate(body)
