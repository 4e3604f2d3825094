"""What a key is charged: the tokens that engines have read and generated, however its requests end."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from overproof.engines.base import Piece, Sampling
from overproof.engines.llamacpp import LlamaCpp
from overproof.serve import api_keys
from overproof.serve.access_log import AccessLog
from overproof.serve.api_keys import ApiKey, RateLimiter
from overproof.serve.async_engine import Work
from overproof.serve.environment import KEY_VARIABLE
from overproof.serve.middleware import Access, Telemetry
from overproof.serve.routes import build_app
from single_model import one

PROMPT, SAMPLE = "import os\n", Sampling(1)


class Charges(Telemetry):
    """Notes who is charged what."""

    def __init__(self) -> None:
        super().__init__(RateLimiter())
        self.found = list[tuple[str | None, Work]]()

    def on_work(self, package: str, key: ApiKey | None, work: Work) -> None:
        super().on_work(package, key, work)
        self.found.append((None if key is None else key.name, work))


@pytest.fixture(scope="module")
def engine(text_package: Path) -> Iterator[LlamaCpp]:
    engine = LlamaCpp(text_package / "model.gguf", slots=2)
    yield engine
    engine.close()


@pytest.fixture
def keys(tmp_path: Path) -> tuple[str, str]:
    file = str(tmp_path / "keys.json")
    return file, api_keys.add_key(file, "team", 5, 100_000)


def charged(
    package: Path, engine: Any, keys: tuple[str, str], body: dict[str, Any], leave_after: int | None = None,
    key: str | None = None,
) -> tuple[list[tuple[str | None, Work]], list[Any], list[dict[str, Any]]]:  # fmt: skip
    """What is charged for a request whose client may go away after so many messages, the messages, the log."""
    file, own = keys
    charges = Charges()
    log = AccessLog(build_app(one(package, engine, max_tokens=100), Access(api_keys.hash_key("own"), file), charges))
    sent: list[Any] = []
    lines = list[str]()

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.extend(record.getMessage().split("\n")[1:])

    async def request() -> None:
        bodies, gone = iter([json.dumps(body).encode()]), asyncio.Event()
        if leave_after == 0:
            asyncio.get_running_loop().call_later(0.3, gone.set)

        async def receive() -> Any:
            for each in bodies:
                return {"type": "http.request", "body": each, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)
            if leave_after is not None and len(sent) > leave_after > 0:
                gone.set()

        scope = {
            "type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"",
            "headers": [(b"content-type", b"application/json"), (b"host", b"localhost"),
                        (b"authorization", f"Bearer {own if key is None else key}".encode())],
            "client": ("127.0.0.1", 1),
        }  # fmt: skip
        await log(scope, receive, send)
        log.flush()

    logger, handler = logging.getLogger("ray.serve"), Lines()
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        asyncio.run(asyncio.wait_for(request(), 60))
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
    return charges.found, sent, [json.loads(line) for line in lines]


@pytest.mark.parametrize("more", [{}, {"stream": True}, {"logprobs": 1}, {"logprobs": 1, "stream": True}])
def test_every_choice_is_charged(text_package: Path, engine: LlamaCpp, keys: tuple[str, str], more: Any) -> None:
    body = {"prompt": PROMPT, "n": 3, "max_tokens": 5, "seed": 1, "logit_bias": {"0": -100}, **more}
    found, _, _ = charged(text_package, engine, keys, body)
    read = engine.complete(PROMPT, SAMPLE).prompt_tokens
    assert [(name, work.prompt_tokens, work.completion_tokens) for name, work in found] == [("team", read, 5)] * 3


def test_a_prompt_that_is_told_is_read_once_more(text_package: Path, engine: LlamaCpp, keys: tuple[str, str]) -> None:
    read = engine.complete(PROMPT, SAMPLE).prompt_tokens
    for more, times in (({"max_tokens": 0}, 1), ({"max_tokens": 2, "logit_bias": {"0": -100}}, 2)):
        found, _, _ = charged(text_package, engine, keys, {"prompt": PROMPT, "echo": True, "logprobs": 1, **more})
        total = sum(work.prompt_tokens for _, work in found), sum(work.completion_tokens for _, work in found)
        assert total == (times * read, more["max_tokens"])


class Slow:
    """Pieces of one token, one in 20 ms, until closed; counts those that it made."""

    prompt_tokens = 7

    def __init__(self) -> None:
        self.completion_tokens = 0
        self._closed = threading.Event()

    def stream(self, *_: Any) -> Any:
        made = Slow()
        made._closed = self._closed
        return made

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> Piece:
        if self._closed.wait(0.02):
            raise StopIteration
        self.completion_tokens += 1
        return Piece("x", None, 7, self.completion_tokens)

    def close(self) -> None:
        self._closed.set()


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
def test_who_goes_away_is_charged_for_what_was_done(
    text_package: Path, keys: tuple[str, str], stream: bool, n: int
) -> None:
    body = {"prompt": "x", "n": n, "stream": stream, "max_tokens": 100}
    found, sent, (line,) = charged(text_package, Slow(), keys, body, leave_after=4 if stream else 0)
    assert sent[0]["status"] == (200 if stream else 499)
    assert [(name, work.prompt_tokens) for name, work in found] == [("team", 7)] * n
    assert all(work.completion_tokens > 0 for _, work in found)
    assert (line["key"], line["status"]) == ("team", sent[0]["status"])


def test_who_goes_away_before_the_first_event_is_charged_for_the_prompt(
    text_package: Path, keys: tuple[str, str]
) -> None:
    class Reads(Slow):
        def stream(self, *_: Any) -> Any:
            return self

        def __next__(self) -> Piece:
            self._closed.wait(30)  # it is reading
            raise StopIteration

    found, sent, _ = charged(text_package, Reads(), keys, {"prompt": "x", "stream": True}, leave_after=0)
    assert sent[0]["status"] == 499
    assert found == [("team", Work(7, 0))]


def test_a_cancelled_request_with_log_probabilities_is_charged(
    text_package: Path, engine: LlamaCpp, keys: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp generates to its end, and reads it once more where tokens end inside a character."""
    body = {"prompt": PROMPT, "logprobs": 1, "max_tokens": 100, "logit_bias": {"0": -100}}
    asked = threading.Event()
    complete = engine.complete

    def begun(*arguments: Any) -> Any:
        asked.set()
        return complete(*arguments)

    monkeypatch.setattr(engine, "complete", begun)
    found, _, _ = charged(text_package, engine, keys, body, leave_after=0)
    assert asked.is_set()
    ((name, work),) = found
    assert (name, work.prompt_tokens > 0, work.completion_tokens) == ("team", True, 100)


def test_a_text_that_breaks_off_is_charged(text_package: Path, keys: tuple[str, str]) -> None:
    class Breaks(Slow):
        def __next__(self) -> Piece:
            if self.completion_tokens == 3:
                raise RuntimeError
            return super().__next__()

        def stream(self, *_: Any) -> Any:
            return self

    for stream in (True, False):
        found, _, _ = charged(text_package, Breaks(), keys, {"prompt": "x", "stream": stream})
        assert found == [("team", Work(7, 3))]


def test_the_log_names_the_key_of_every_request(text_package: Path, engine: LlamaCpp, keys: tuple[str, str]) -> None:
    body = {"prompt": PROMPT, "max_tokens": 1}
    file, own = keys
    free = api_keys.add_key(file, "free", None, None)
    for key, name, status in ((own, "team", 200), (free, "free", 200), ("own", KEY_VARIABLE, 200), ("op-x", None, 401)):
        _, sent, (line,) = charged(text_package, engine, keys, body, key=key)
        assert (line["key"], line["status"], sent[0]["status"]) == (name, status, status)
    _, _, (line,) = charged(text_package, engine, keys, {"prompt": ""})
    assert (line["key"], line["status"]) == ("team", 400)
