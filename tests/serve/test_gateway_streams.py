"""A language model on real replicas over real HTTP: streams, load, errors, and what is refused at the start."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from ray.util.state import list_actors

from overproof.config import Serve
from overproof.errors import InputError
from overproof.serve.application import build
from overproof.serve.server import call_controller, start_gateway, start_serving
from packing import copy, edit
from shared_server import SETTINGS, SharedServer


@pytest.fixture
def server(shared_server: SharedServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=shared_server.url, timeout=60) as client:
        yield client


def _events(server: httpx.Client, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of a streamed completion; the last one has the usage."""
    arguments = body | {"stream": True, "stream_options": {"include_usage": True}}
    with server.stream("POST", "/v1/completions", json=arguments) as reply:
        assert reply.status_code == 200
        assert reply.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def _complete(server: httpx.Client, **body: Any) -> dict[str, Any]:
    reply: dict[str, Any] = server.post("/v1/completions", json=body).raise_for_status().json()
    return reply


@pytest.mark.parametrize("seed", range(6))
def test_streamed_pieces_join_to_the_unary_text(server: httpx.Client, seed: int) -> None:
    """Greedy and hot: a hot model of bytes writes broken characters, which both must cut the same way."""
    body = {"prompt": [0, 70 + seed], "max_tokens": 20 + seed, "temperature": seed % 3 / 1.5, "seed": seed}
    whole, (*events, last) = _complete(server, **body), _events(server, body)
    assert "".join(event["choices"][0]["text"] for event in events) == whole["choices"][0]["text"]
    assert [event["usage"] for event in events] == [None] * len(events)
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert events[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert len({event["id"] for event in (*events, last)}) == 1


def test_a_stop_string_ends_both(server: httpx.Client) -> None:
    body = {"prompt": "import os\n", "max_tokens": 64, "temperature": 1.0, "seed": 3, "stop": ["e", "\n\n"]}
    whole, (*events, _) = _complete(server, **body), _events(server, body)
    text = "".join(event["choices"][0]["text"] for event in events)
    assert text == whole["choices"][0]["text"]
    assert (whole["choices"][0]["finish_reason"], "e" in text) == ("stop", False)


def test_eight_requests_at_once(server: httpx.Client) -> None:
    def ask(i: int) -> int:
        body = {"prompt": [0, 70 + i], "max_tokens": 40, "temperature": 1.0, "seed": i}
        if i % 2:
            usage: dict[str, int] = _events(server, body)[-1]["usage"]
        else:
            usage = _complete(server, **body)["usage"]
        return usage["completion_tokens"]

    with ThreadPoolExecutor(8) as pool:
        assert all(0 < tokens <= 40 for tokens in pool.map(ask, range(8)))


def test_health_answers_while_every_slot_decodes(server: httpx.Client) -> None:
    with ThreadPoolExecutor(6) as pool:
        busy = [pool.submit(_complete, server, prompt=[0, 70], max_tokens=256, temperature=2.0) for _ in range(6)]
        slowest = 0.0
        while not all(future.done() for future in busy):
            began = time.monotonic()
            assert server.get("/healthz").status_code == 200
            slowest = max(slowest, time.monotonic() - began)
    assert slowest < 2
    assert all(future.result()["usage"]["completion_tokens"] for future in busy)


def test_a_client_that_goes_away_leaves_its_slot(server: httpx.Client) -> None:
    for _ in range(4):
        body = {"prompt": [0, 70], "max_tokens": 256, "temperature": 2.0, "stream": True}
        with server.stream("POST", "/v1/completions", json=body) as reply:
            next(reply.iter_lines())
    assert _complete(server, prompt="x", max_tokens=1)["usage"]["completion_tokens"] == 1


def test_errors_arrive_through_the_gateway(server: httpx.Client) -> None:
    long = {"prompt": "x" * 9999, "stream": True}
    for body in ({"prompt": ""}, {"prompt": "x", "max_tokens": 257}, long):
        reply = server.post("/v1/completions", json=body)
        assert (reply.status_code, list(reply.json())) == (400, ["error"])
    assert server.post("/v1/classify", json={"images": [[0.0] * 64]}).status_code == 404
    assert server.get("/v1/models", headers={"x-request-timeout-seconds": "0"}).status_code == 400


def test_replicas_take_what_was_reserved_on_the_nodes_that_were_named(server: httpx.Client) -> None:
    (version,) = call_controller("deployments").models["stdlib-lm"].versions
    alive = list_actors(filters=[("state", "=", "ALIVE")], detail=True)
    (replica,) = [actor for actor in alive if version.application in (actor.name or "")]
    assert replica.required_resources["CPU"] == SETTINGS.cpus_per_replica
    (labelled,) = [node["NodeID"] for node in ray.nodes() if node["Labels"].get("group") == "serve"]
    assert replica.node_id == labelled


def test_a_running_server_keeps_its_address(server: httpx.Client, text_package: Path) -> None:
    with pytest.raises(InputError, match=r"serve\.port: found 1, and the running server has \d+"):
        start_serving(text_package, Serve(port=1))
    assert server.get("/healthz").status_code == 200


def test_only_proven_packages_are_served(ray_cluster: str, text_package: Path, tmp_path: Path) -> None:
    folder = copy(text_package, tmp_path)
    edit(folder / "verdict.json", lambda verdict: verdict.update(passed=False, chosen=None))
    for attempt in (lambda: start_serving(folder, SETTINGS), lambda: build({"package": str(folder)})):
        with pytest.raises(InputError, match="no passing verdict"):
            attempt()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({}, "args.package: found None"),
        ({"package": "/nowhere"}, "no package there"),
        ({"package": ["PACKAGE", 1]}, "expected a package's folder or URI, or a list of such"),
        ({"package": "PACKAGE", "host": "0.0.0.0"}, "can be reached from other machines"),
        ({"package": "PACKAGE", "slotz": 1}, "slotz: unknown field"),
        ({"package": "PACKAGE", "min_replicas": 3}, "max_replicas 2 is below min_replicas 3"),
    ],
)
def test_bad_arguments_are_refused(text_package: Path, args: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build({key: str(text_package) if value == "PACKAGE" else value for key, value in args.items()})


def test_an_address_others_reach_needs_a_key(text_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OVERPROOF_API_KEY", raising=False)
    for host in ("0.0.0.0", "192.0.2.7"):
        with pytest.raises(InputError, match=r"can be reached from other machines; set OVERPROOF_API_KEY"):
            start_gateway({str(text_package): Serve()}, Serve(host=host))
