"""The HTTP API without Ray: its schema, its refusals, and who may ask."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import re
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from overproof.engines.base import Piece
from overproof.engines.llamacpp import LlamaCpp
from overproof.engines.onnx_runtime import OnnxRuntime
from overproof.errors import InputError
from overproof.package.package import open_package
from overproof.registry import TASKS
from overproof.serve import middleware
from overproof.serve.access_log import AccessLog
from overproof.serve.grammar import GrammarChecker
from overproof.serve.middleware import MAX_BODY_BYTES, Access
from overproof.serve.model_registry import SingleModel
from overproof.serve.requests import ChatRequest, CompletionRequest
from overproof.serve.responses import ChatEvent, ChatReply, CompletionReply, ErrorReply, ModelList, RowsReply
from overproof.serve.routes import build_app
from overproof.tasks.image_classification import ClassifyImagesRequest
from single_model import one

OPEN, KEYED = Access(None), Access(hashlib.sha256(b"secret").hexdigest())
BLANK = [0.0] * 64
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def text(text_package: Path) -> Iterator[SingleModel]:
    engine = LlamaCpp(text_package / "model.gguf", slots=2)
    yield one(text_package, engine)
    engine.close()


@pytest.fixture(scope="module")
def digits(digits_package: Path) -> SingleModel:
    return one(digits_package, OnnxRuntime(digits_package / "model.onnx"))


def ask(app: Any, method: str, path: str, client: str = "127.0.0.1", **request: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False, client=(client, 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            return await http.request(method, path, **request)

    return asyncio.run(send())


def test_a_reply_says_which_file_gave_it(text: SingleModel, text_package: Path) -> None:
    app = build_app(text, OPEN)
    reply = ask(app, "POST", "/v1/completions", json={"prompt": "import os\n", "max_tokens": 8}).json()
    assert reply["model"] == "stdlib-lm"
    assert text.served.model.overproof.sha256.startswith(reply["system_fingerprint"])
    assert reply["package"] == text.served.model.overproof.package
    usage = reply["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    (model,) = ask(app, "GET", "/v1/models").json()["data"]
    assert model["overproof"]["sha256"] == text.served.model.overproof.sha256
    lost, *reasons = model["overproof"]["verdict"]
    assert lost.startswith("bits per byte against the teacher: ")
    assert len(reasons) == len(open_package(text_package).content.policy.rules)
    assert model["overproof"]["parents"] == text.served.model.overproof.parents
    assert ask(app, "GET", "/healthz").json() == {"status": "ok"}


def test_a_body_of_unknown_length_is_answered_as_one_that_says_it(digits: SingleModel) -> None:
    app, body = build_app(digits, OPEN), json.dumps({"images": [[0.25] * 64, [0.75] * 64]}).encode()

    async def in_parts() -> AsyncIterator[bytes]:
        yield body[:100]
        yield body[100:]

    whole = ask(app, "POST", "/v1/classify", content=body, headers=JSON)
    parts = ask(app, "POST", "/v1/classify", content=in_parts(), headers=JSON)
    assert "content-length" not in parts.request.headers
    assert whole.status_code == parts.status_code == 200
    assert whole.json()["data"] == parts.json()["data"]


def test_rows_and_flat_pixels_are_the_same_image(digits: SingleModel) -> None:
    image = [i / 64 for i in range(64)]
    rows = [image[i : i + 8] for i in range(0, 64, 8)]
    flat, nested = ask(build_app(digits, OPEN), "POST", "/v1/classify", json={"images": [image, rows]}).json()["data"]
    assert flat["probabilities"] == nested["probabilities"]
    assert flat["label"] == max(range(10), key=flat["probabilities"].__getitem__)
    assert sum(flat["probabilities"]) == pytest.approx(1, abs=1e-5)


def schema(content: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": content}}


COMPLETIONS: list[tuple[dict[str, Any], str, str]] = [
    ({}, "prompt", "field required"),
    ({"prompt": None}, "prompt", "field required"),
    ({"prompt": ""}, "prompt", "none empty"),
    ({"prompt": []}, "prompt", "none empty"),
    ({"prompt": ["a", ""]}, "prompt", "none empty"),
    ({"prompt": [[1], ["a"]]}, "prompt", "text or a list of token ids"),
    ({"prompt": [1, "a"]}, "prompt", "text or a list of token ids"),
    ({"prompt": 5}, "prompt", "text or a list of token ids"),
    ({"prompt": [512]}, "prompt", "expected 0 to 511"),
    ({"prompt": "x" * 9999}, "prompt", "tokens long"),
    ({"prompt": "x" * 9999, "stream": True}, "prompt", "tokens long"),
    ({"prompt": "x", "max_tokens": 33}, "max_tokens", "at most 32"),
    ({"prompt": "x", "max_tokens": 0}, "max_tokens", "1 or more, or 0 with echo"),
    ({"prompt": "x", "max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
    ({"prompt": "x", "echo": True, "logprobs": 21}, "logprobs", "less than or equal to 20"),
    ({"prompt": "x" * 9999, "echo": True, "logprobs": 1, "max_tokens": 0}, "prompt", "tokens long"),
    ({"prompt": ["x", [512]], "echo": True, "max_tokens": 0}, "prompt", "expected 0 to 511"),
    ({"prompt": "x", "echo": 1}, "echo", "valid boolean"),
    ({"prompt": "x", "max_tokens": "9"}, "max_tokens", "valid integer"),
    ({"prompt": "x", "temperature": 3}, "temperature", "less than or equal to 2"),
    ({"prompt": "x", "top_p": -0.1}, "top_p", "greater than or equal to 0"),
    ({"prompt": "x", "seed": 1.5}, "seed", "valid integer"),
    ({"prompt": "x", "best_of": 2}, "best_of", "unknown field"),
    ({"prompt": "x", "max_token": 2}, "max_token", "max_token: unknown field, nearest is 'max_tokens'; leave it out"),
    ({"prompt": "x", "suffix": "y"}, "suffix", "unknown field"),
    ({"prompt": "x", "stream_options": {"usage": True}}, "stream_options", "stream_options.usage: unknown field"),
    ({"prompt": "x", "stop": [""]}, "stop", "none empty"),
    ({"prompt": "x", "stop": ["a"] * 17}, "stop", "up to 16"),
    ({"prompt": "x", "stream": "yes"}, "stream", "valid boolean"),
    ({"prompt": "x", "tools": []}, "tools", "unknown field"),
    ({"prompt": "x", "logprobs": 21}, "logprobs", "less than or equal to 20"),
    ({"prompt": "x", "n": 17}, "n", "less than or equal to 16"),
    ({"prompt": "x", "logit_bias": {"512": 1}}, "logit_bias", "expected 0 to 511"),
    ({"prompt": "x", "logit_bias": {"one": 1}}, "logit_bias", "token ids with numbers"),
    ({"prompt": "x", "logit_bias": {"1": 101}}, "logit_bias", "from -100 to 100"),
    ({"prompt": "x", "presence_penalty": 3}, "presence_penalty", "less than or equal to 2"),
    ({"prompt": "x", "grammar": "root ::= nothing"}, "grammar", "GBNF"),
    ({"prompt": "x", "grammar": "root ::= nothing", "stream": True}, "grammar", "GBNF"),
    ({"prompt": "x", "grammar": "%llguidance {}\nstart: nothing"}, "grammar", "unknown name"),
    ({"prompt": "x", "grammar": "x" * 16385}, "grammar", "at most 16384"),
    ({"prompt": "x", "grammar": "root ::= " + '"i"? ' * 2000}, "grammar", "items; max is"),
    ({"prompt": "x", "grammar": ""}, "grammar", "at least 1"),
    ({"prompt": "x", "grammar": "%llguidance {}\nstart: <|nosuch|>"}, "grammar", "nosuch"),
    ({"prompt": "x", "grammar": "root ::= " + "(" * 8000 + '"x"' + ")" * 8000}, "grammar", "expected GBNF"),
    ({"prompt": "x", "response_format": schema({"$ref": "#"})}, "response_format", ""),
    ({"prompt": "x", "response_format": schema({"type": "array", "minItems": 10**9})}, "response_format", "minItems"),
    ({"prompt": [[0], [10**6]], "stream": True}, "prompt", "token id 1000000"),
    ({"prompt": ["x", " " * 4_000_000], "stream": True, "n": 2}, "prompt", "tokens hold fewer"),
    ({"prompt": "x", "stop": "\ud800"}, "stop", "valid Unicode"),
    ({"prompt": "x", "user": "\ud800"}, "user", "valid Unicode"),
    ({"prompt": " " * 4_000_000}, "prompt", "tokens hold fewer"),
    ({"prompt": "x", "response_format": {"type": "json_schema"}}, "response_format", "belongs to type"),
    ({"prompt": "x", "response_format": {"type": "xml"}}, "response_format", "'text', 'json_object' or"),
    ({"prompt": "x", "response_format": schema({"type": "nope"})}, "response_format", "invalid type: nope"),
    ({"prompt": "x", "response_format": schema({"$ref": "http://x"})}, "response_format", "not present"),
    ({"prompt": "x", "response_format": schema({"enum": ["x" * 17000]})}, "response_format", "at most 16384"),
    (
        {"prompt": "x", "response_format": {"type": "json_object"}, "grammar": 'root ::= "x"'},
        "grammar",
        "together with",
    ),
]


@pytest.mark.parametrize(("body", "param", "message"), COMPLETIONS)
def test_a_bad_completion_request_gets_one_clear_error(
    text: SingleModel, body: dict[str, Any], param: str, message: str
) -> None:
    reply = ask(build_app(text, OPEN), "POST", "/v1/completions", content=json.dumps(body), headers=JSON)
    assert reply.status_code == 400
    error = ErrorReply.model_validate(reply.json()).error
    assert (error.param, error.type) == (param, "invalid_request_error")
    assert error.message.startswith(param)
    assert message.lower() in error.message.lower()


@pytest.mark.parametrize(
    "images",
    [None, [], "x", [5], [[]], [BLANK[:-1]], [[2.0] * 64], [["a"] * 64], [[[0.0] * 8] * 7], [[BLANK[:8]] * 7 + [[0.0]]],
     [BLANK, [0.0]], [BLANK] * 1025, [[True] * 64]],
)  # fmt: skip
def test_a_bad_image_gets_one_clear_error(digits: SingleModel, images: Any) -> None:
    reply = ask(build_app(digits, OPEN), "POST", "/v1/classify", json={"images": images})
    error = ErrorReply.model_validate(reply.json()).error
    assert (reply.status_code, error.param) == (400, "images"), error
    assert error.message.startswith("images")


@pytest.mark.parametrize("content", [b"{bad", b'"text"', b"[]", b"", b"\xff\xfe"])
def test_a_body_that_is_no_json_object_is_refused(text: SingleModel, content: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    reply = ask(build_app(text, OPEN), "POST", "/v1/completions", content=content, headers=headers)
    assert reply.status_code == 400
    assert "JSON" in ErrorReply.model_validate(reply.json()).error.message


@pytest.mark.parametrize("grammar", ["root ::= " + '("i"* "i"*)* ' * 50, "root ::= " + '"i"? ' * 600])
@pytest.mark.parametrize("stream", [True, False])
def test_a_grammar_with_many_ways_to_go_on_is_kept_to_or_refused(text: SingleModel, grammar: str, stream: bool) -> None:
    """By itself llama.cpp takes seconds with them, in which nobody gets an answer, or lets go of them on the way."""
    body = {"prompt": "x", "grammar": grammar, "max_tokens": 32, "stream": stream}
    reply = ask(build_app(text, OPEN), "POST", "/v1/completions", json=body)
    assert reply.status_code == 200 or "too complex for the engine" in reply.text
    assert set("".join(re.findall(r'"text":"([^"]*)"', reply.text))) <= {"i"}


def test_text_that_a_grammar_does_not_allow_is_found() -> None:
    checker = GrammarChecker('%llguidance {}\nstart: "yes" | "no"')
    checker.add("y")
    checker.add("es")
    for text in ("yo", "no more", "x"):
        with pytest.raises(InputError, match="which dropped it"):
            GrammarChecker('%llguidance {}\nstart: "yes" | "no"').add(text)


def test_wrong_routes_and_models_say_what_is_right(text: SingleModel, digits: SingleModel) -> None:
    app = build_app(text, OPEN)
    for reply, message in (
        (ask(app, "POST", "/v1/classify", json={"images": [BLANK]}), "ask it at POST /v1/completions"),
        (ask(build_app(digits, OPEN), "POST", "/v1/completions", json={"prompt": "x"}), "ask it at POST /v1/classify"),
        (ask(app, "POST", "/v1/completions", json={"prompt": "x", "model": "gpt"}), "expected 'stdlib-lm'"),
        (ask(app, "GET", "/v1/models/gpt"), "expected 'stdlib-lm'"),
        (ask(app, "POST", "/v1/embeddings", json={"input": "x"}), "Not Found"),
    ):
        assert reply.status_code == 404
        error = ErrorReply.model_validate(reply.json()).error
        assert (message in error.message, error.type) == (True, "not_found_error")
    assert ask(app, "GET", "/v1/completions").status_code == 405


def test_large_bodies_are_refused_announced_or_not(text: SingleModel) -> None:
    async def chunks() -> Any:
        for _ in range(MAX_BODY_BYTES // 65536 + 1):
            yield b"x" * 65536

    app = build_app(text, OPEN)
    for content in (b"x" * (MAX_BODY_BYTES + 1), chunks()):
        reply = ask(app, "POST", "/v1/completions", content=content, headers={"Content-Type": "application/json"})
        assert reply.status_code == 413
        assert "larger than" in ErrorReply.model_validate(reply.json()).error.message


def test_a_client_whose_requests_hold_too_much_is_refused_more(
    text: SingleModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(middleware, "MAX_HELD_BYTES", 1000)
    app = build_app(text, OPEN)
    for _ in range(2):
        assert ask(app, "POST", "/v1/completions", json={"prompt": "x" * 900, "model": "no"}).status_code == 404
        refused = ask(app, "POST", "/v1/completions", json={"prompt": "x" * 1100})
        assert (refused.status_code, refused.headers["Retry-After"]) == (429, "1")
        assert ErrorReply.model_validate(refused.json()).error.type == "rate_limit_error"


def test_a_body_that_does_not_come_is_not_waited_for(text: SingleModel, monkeypatch: pytest.MonkeyPatch) -> None:
    async def drops() -> Any:
        for _ in range(100):
            yield b" "
            await asyncio.sleep(0.05)

    monkeypatch.setattr(middleware, "BODY_TIMEOUT_S", 0.2)
    headers = {"Content-Type": "application/json"}
    reply = ask(build_app(text, OPEN), "POST", "/v1/completions", content=drops(), headers=headers)
    assert (reply.status_code, list(reply.json())) == (408, ["error"])


class Endless:
    """Pieces until closed."""

    prompt_tokens, completion_tokens = 1, 0

    def __init__(self) -> None:
        self.closed = threading.Event()

    def stream(self, *_: Any) -> Any:
        return self

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> Piece:
        if self.closed.wait(0.01):
            raise StopIteration
        return Piece("x")

    def close(self) -> None:
        self.closed.set()


@pytest.mark.parametrize("stream", [True, False])
def test_a_reply_that_takes_too_long_ends(text_package: Path, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    monkeypatch.setattr(middleware, "REQUEST_TIMEOUT_S", 0.3)
    engine = Endless()
    body = {"prompt": "x", "stream": stream}
    reply = ask(build_app(one(text_package, engine), OPEN), "POST", "/v1/completions", json=body)
    assert reply.status_code == (200 if stream else 408)
    assert ("timeout_error" in reply.text, "[DONE]" in reply.text) == (True, False)
    assert engine.closed.is_set()


def test_with_a_key_everything_but_health_needs_it(text: SingleModel) -> None:
    app = build_app(text, KEYED)
    assert ask(app, "GET", "/healthz").status_code == 200
    for value in (None, "secret", "Bearer", "Bearer ", "Bearer Secret", "Basic secret", "Bearer secretx"):
        reply = ask(app, "GET", "/v1/models", headers={} if value is None else {"Authorization": value})
        assert reply.status_code == 401
        sent = (value or "").removeprefix("Bearer").strip() and (value or "").startswith("Bearer")
        found = "the API key is none of this server's" if sent else "no API key was sent"
        assert reply.json()["error"]["message"].startswith(f"{found}; expected the header")
        assert reply.headers["WWW-Authenticate"] == "Bearer"
        assert ErrorReply.model_validate(reply.json()).error.type == "authentication_error"
    for client in ("127.0.0.1", "10.1.2.3"):
        bearer = {"Authorization": "Bearer secret"}
        assert ask(app, "GET", "/v1/models", client=client, headers=bearer).status_code == 200
    assert ask(app, "POST", "/v1/completions", content=b"{bad").status_code == 401  # before the body is looked at


def test_without_a_key_other_machines_are_refused(text: SingleModel) -> None:
    app = build_app(text, OPEN)
    assert ask(app, "GET", "/v1/models", client="::1").status_code == 200
    for client in ("10.1.2.3", "testclient", "2001:db8::1"):
        reply = ask(app, "GET", "/v1/models", client=client)
        assert reply.status_code == 403
        assert "OVERPROOF_API_KEY" in ErrorReply.model_validate(reply.json()).error.message


def test_headers_that_lift_serves_limits_are_refused(text: SingleModel) -> None:
    for name in ("x-request-timeout-seconds", "X-Request-Disconnect-Disabled"):
        reply = ask(build_app(text, OPEN), "GET", "/v1/models", headers={name: "0"})
        assert reply.status_code == 400


def test_a_failing_engine_is_a_500_that_tells_nothing(digits_package: Path) -> None:
    class Broken:
        def logprobs(self, _: Any) -> Any:
            raise RuntimeError("a secret path")

    reply = ask(build_app(one(digits_package, Broken()), OPEN), "POST", "/v1/classify", json={"images": [BLANK]})
    assert reply.status_code == 500
    assert ErrorReply.model_validate(reply.json()).error.type == "server_error"
    assert "secret" not in reply.text


CHATS: list[tuple[dict[str, Any], str, str]] = [
    ({}, "messages", "field required"),
    ({"messages": []}, "messages", "at least 1"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages", "'system', 'developer', 'user', 'assistant' or"),
    ({"messages": [{"role": "user"}]}, "messages", "field required"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "parts of type 'text'"),
    ({"messages": [{"role": "user", "content": "x" * 9999}]}, "prompt", "tokens long"),
    ({"messages": [{"role": "user", "content": "x"}], "max_completion_tokens": 33}, "max_completion_tokens", "at most"),
    ({"messages": [{"role": "user", "content": "x"}], "top_logprobs": 3}, None, "needs logprobs"),
    ({"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "max_completion_tokens": 1}, None, "give one"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "param", "message"), CHATS)
def test_a_bad_chat_request_gets_one_clear_error(
    text: SingleModel, body: dict[str, Any], param: str | None, message: str
) -> None:
    reply = ask(build_app(text, OPEN), "POST", "/v1/chat/completions", json=body)
    error = ErrorReply.model_validate(reply.json()).error
    assert (reply.status_code, error.param) == (400, param), error
    assert message in error.message


def test_a_model_without_a_chat_template_does_not_chat(second_package: Path) -> None:
    engine = LlamaCpp(second_package / "model.gguf")
    app = build_app(one(second_package, engine), OPEN)
    reply = ask(app, "POST", "/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}]})
    assert reply.status_code == 400
    assert "no chat template" in ErrorReply.model_validate(reply.json()).error.message
    engine.close()


def test_a_chat_models_package_answers_at_both_routes(text: SingleModel) -> None:
    (served,) = text.models()
    provenance = served.model.overproof.model_copy(update={"task": "chat"})
    chat = replace(served, model=served.model.model_copy(update={"overproof": provenance}))
    app, task = build_app(SingleModel(chat), OPEN), TASKS["chat"]
    body = task.example({}) | {"max_tokens": 2}
    reply = ask(app, "POST", task.route, json=body)
    assert reply.status_code == 200, reply.text
    assert task.describe_reply(body, reply.json()).startswith("What can you do? ")
    assert ask(app, "POST", "/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200
    refused = ask(app, "POST", "/v1/classify", json={"texts": ["x"]})
    assert (refused.status_code, "ask it at POST /v1/chat/completions" in refused.text) == (404, True)


def test_a_stream_that_fails_says_so_at_its_end(text_package: Path) -> None:
    class Breaks:
        prompt_tokens, completion_tokens = 1, 1

        def stream(self, *_: Any) -> Any:
            return self

        def __init__(self) -> None:
            self.pieces = iter([Piece("x")])

        def __iter__(self) -> Any:
            return self

        def __next__(self) -> Piece:
            for piece in self.pieces:
                return piece
            raise RuntimeError("a secret path")

        def close(self) -> None: ...

    app = build_app(one(text_package, Breaks()), OPEN)
    reply = ask(app, "POST", "/v1/completions", json={"prompt": "x", "stream": True})
    first, last = [line.removeprefix("data: ") for line in reply.text.splitlines() if line]
    assert (reply.status_code, json.loads(first)["choices"][0]["text"]) == (200, "x")
    assert ErrorReply.model_validate_json(last).error.type == "server_error"
    assert "secret" not in reply.text


def test_where_one_choice_cannot_be_had_the_others_end_too(text_package: Path) -> None:
    class Picky(Endless):
        def stream(self, prompt: Any, _: Any) -> Any:
            if prompt == "bad":
                raise InputError("prompt: bad")
            return self

    engine = Picky()
    reply = ask(build_app(one(text_package, engine), OPEN), "POST", "/v1/completions", json={"prompt": ["x", "bad"]})
    assert (reply.status_code, reply.json()["error"]["message"]) == (400, "prompt: bad")
    assert engine.closed.is_set()


def test_every_request_is_a_line_of_json_without_its_prompt_unless_asked_for(
    text: SingleModel, caplog: pytest.LogCaptureFixture
) -> None:
    access_log = logging.getLogger("ray.serve")
    for with_bodies in (False, True):
        caplog.clear()
        log: Any = AccessLog(build_app(text, OPEN), with_bodies)
        with caplog.at_level(logging.INFO, "ray.serve"):
            access_log.addHandler(caplog.handler)
            good = ask(log, "POST", "/v1/completions", json={"prompt": "a secret", "max_tokens": 1})
            bad = ask(log, "GET", "/nowhere?key=secret")
            log.flush()
            access_log.removeHandler(caplog.handler)
        lines = [json.loads(line) for record in caplog.records for line in record.getMessage().split("\n")[1:]]
        output = [(line["request"], line["method"], line["path"], line["status"], line["client"]) for line in lines]
        assert list(dict.fromkeys(output)) == [
            (good.headers["x-request-id"], "POST", "/v1/completions", 200, "127.0.0.1"),
            (bad.headers["x-request-id"], "GET", "/nowhere", 404, "127.0.0.1"),
        ]
        assert ("secret" in caplog.text) == with_bodies
        assert all(line["seconds"] >= 0 and line["at"].endswith("Z") for line in lines)


@pytest.mark.parametrize("stream", [True, False])
def test_generation_ends_when_the_client_goes(text_package: Path, stream: bool) -> None:
    engine = Endless()
    app = build_app(one(text_package, engine), OPEN)
    sent: list[Any] = []

    async def client() -> None:
        body, gone = json.dumps({"prompt": "x", "stream": stream}).encode(), asyncio.Event()
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> Any:
            for message in messages:
                return message
            if stream:
                await gone.wait()
            else:
                await asyncio.sleep(0.1)
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)
            if len(sent) == 4:
                gone.set()

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/completions",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json"), (b"host", b"localhost")],
            "client": ("127.0.0.1", 1),
        }
        await asyncio.wait_for(app(scope, receive, send), 10)

    asyncio.run(client())
    assert sent[0]["status"] == (200 if stream else 499)
    assert engine.closed.is_set()


NEUTRAL = {"store": False, "metadata": {"a": "b"}, "service_tier": "auto", "logit_bias": {}, "user": "u", "top_p": 0}


@pytest.mark.parametrize("seed", [-1, 0, 2**31, 2**63, -(2**40), 10**30])
def test_what_asks_for_nothing_is_taken(text: SingleModel, seed: int) -> None:
    body = {"prompt": "x", "max_tokens": 2, "seed": seed, "best_of": 1, "echo": False, "suffix": "", **NEUTRAL}
    body |= {"stream_options": {"include_obfuscation": False}}
    reply = ask(build_app(text, OPEN), "POST", "/v1/completions", content=json.dumps(body), headers=JSON)
    assert reply.status_code == 200, reply.text


def test_a_servers_own_message_may_be_sent_back() -> None:
    said = {"role": "assistant", "content": None, "refusal": None}
    request = ChatRequest.model_validate({"messages": [{"role": "user", "content": "x"}, said], "echo": False})
    assert [message.for_template() for message in request.messages][1] == {"role": "assistant", "content": ""}
    for role in ("user", "system"):
        with pytest.raises(ValidationError, match="content: field required"):
            ChatRequest.model_validate({"messages": [{"role": role, "content": None}]})
    with pytest.raises(ValidationError, match="best_of"):
        ChatRequest.model_validate({"messages": [{"role": "user", "content": "x"}], "best_of": 2})


def test_nulls_and_fields_of_openais_replies_are_taken_at_any_depth() -> None:
    said = {"role": "assistant", "content": "a", "annotations": [], "audio": None, "function_call": None, "x": None}
    call = {"id": "c", "type": "function", "index": None, "function": {"name": "f", "arguments": "{}", "x": None}}
    called = {"role": "assistant", "tool_calls": [call]}
    user = {"role": "user", "content": "x", "name": None}
    neutral = {"modalities": ["text"], "functions": [], "function_call": "none", "safety_identifier": "s",
               "prompt_cache_key": "k", "stream_options": {"include_usage": None}}  # fmt: skip
    request = ChatRequest.model_validate(
        {"messages": [user, said, called], "response_format": {"type": None}, **neutral}
    )
    assert len(request.messages) == 3
    for message, path in (
        (said | {"annotations": [{"type": "url_citation"}]}, "messages.0.annotations"),
        (said | {"audio": {"id": "a"}}, "messages.0.audio"),
        ({"role": "assistant", "tool_calls": [call | {"more": 1}]}, "messages.0.tool_calls.0.more"),
    ):
        with pytest.raises(ValidationError) as refused:
            ChatRequest.model_validate({"messages": [message]})
        assert ".".join(map(str, refused.value.errors()[0]["loc"])) == path
    for name, value in (("modalities", ["audio"]), ("functions", [{"name": "f"}]), ("reasoning_effort", "low")):
        with pytest.raises(ValidationError, match=name):
            ChatRequest.model_validate({"messages": [user], name: value})


@pytest.mark.parametrize(
    ("body", "where"),
    [
        (rb'{"prompt": "\ud800"}', "prompt"),
        (rb'{"prompt": ["a", "b\uDC00"]}', "prompt.1"),
        (rb'{"prompt": "a", "metadata": {"k": ["\ud83d"]}}', "metadata.k.0"),
        (rb'{"prompt": "a", "metadata": {"\ud83d": 1}}', "metadata"),
        (rb'{"prompt": "a", "\udfff": 1}', "a field's name"),
        (rb'{"prompt": "\ud83d\ude00\ude00"}', "prompt"),
        (rb'{"prompt": "\ud83d\ud83d\ude00"}', "prompt"),
        (b'{"prompt": "\xed\xa0\x80"}', "prompt"),
    ],
)
def test_half_a_surrogate_pair_is_refused_wherever_it_stands(text: SingleModel, body: bytes, where: str) -> None:
    reply = ask(build_app(text, OPEN), "POST", "/v1/completions", content=body, headers=JSON)
    assert (reply.status_code, reply.json()["error"]["message"].partition(": expected valid")[0]) == (400, where)


def test_whole_surrogate_pairs_and_escaped_backslashes_are_text(text: SingleModel) -> None:
    for prompt in (rb"\ud83d\ude00", rb"\\ud800", rb"\\\ud83d\ude00"):
        body = b'{"prompt": "' + prompt + b'", "max_tokens": 1, "metadata": {"k": "' + prompt + b'"}}'
        reply = ask(build_app(text, OPEN), "POST", "/v1/completions", content=body, headers=JSON)
        assert reply.status_code == 200, reply.text


def test_proxies_are_told_to_pass_events_on(text: SingleModel) -> None:
    reply = ask(build_app(text, OPEN), "POST", "/v1/completions", json={"prompt": "x", "max_tokens": 1, "stream": True})
    assert reply.headers["X-Accel-Buffering"] == "no"
    assert "no-cache" in reply.headers["Cache-Control"]
    assert reply.headers["Content-Type"].startswith("text/event-stream")


def test_a_prompt_beyond_the_context_has_openais_code(text: SingleModel) -> None:
    for prompt in ("x" * 9999, " " * 4_000_000):
        body = json.dumps({"prompt": prompt})
        reply = ask(build_app(text, OPEN), "POST", "/v1/completions", content=body, headers=JSON)
        error = reply.json()["error"]
        assert (reply.status_code, error["code"]) == (400, "context_length_exceeded")
        assert "This model's maximum context length is 2048 tokens" in error["message"]  # LiteLLM looks for this


def test_the_schema_is_pinned() -> None:
    """Clients rely on these names: change them knowingly."""
    found = {
        model.__name__: sorted(model.model_fields)
        for model in (
            CompletionRequest, CompletionReply, ChatRequest, ChatReply, ChatEvent, ClassifyImagesRequest, RowsReply,
            ModelList,
        )
    }  # fmt: skip
    generated = ["frequency_penalty", "grammar", "logit_bias", "logprobs", "max_tokens", "model", "n",
                 "presence_penalty", "response_format", "seed", "stop", "stream", "stream_options", "temperature",
                 "top_p", "user"]  # fmt: skip
    reply = ["choices", "created", "id", "model", "object", "package", "system_fingerprint", "usage"]
    assert found == {
        "CompletionRequest": sorted([*generated, "echo", "prompt", "return_tokens_as_token_ids"]),
        "ChatRequest": sorted(
            [
                *generated,
                "max_completion_tokens",
                "messages",
                "parallel_tool_calls",
                "tool_choice",
                "tools",
                "top_logprobs",
            ]
        ),
        "CompletionReply": reply,
        "ChatReply": reply,
        "ChatEvent": reply,
        "ClassifyImagesRequest": ["images", "model", "user"],
        "RowsReply": ["data", "model", "object", "package", "system_fingerprint"],
        "ModelList": ["data", "object"],
    }
    assert json.loads(ErrorReply.model_validate({"error": {"message": "m", "type": "t"}}).model_dump_json()) == {
        "error": {"message": "m", "type": "t", "param": None, "code": None}
    }
