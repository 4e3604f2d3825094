"""Replicas that come and go with the load, down to none, and with updates."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from overproof.serve import controller, server
from shared_server import SETTINGS, WAIT_S, SharedServer, wait_until

ON_DEMAND = SETTINGS.model_copy(
    update={"min_replicas": 0, "max_replicas": 2, "upscale_delay_s": 0.3, "downscale_delay_s": 1.0}
)
BODY = {"prompt": [0, 70], "max_tokens": 100, "temperature": 2.0}


def wait_for_replicas(count: int) -> None:
    (version,) = server.call_controller("deployments").models["stdlib-lm"].versions
    wait_until(lambda: controller.count_replicas(version.package) == count)


@contextmanager
def asking(ask: Callable[[httpx.Client], None], clients: int) -> Iterator[None]:
    """So many clients that ask all the time; one that fails fails the test."""
    over = threading.Event()

    def go() -> None:
        with httpx.Client(timeout=WAIT_S, trust_env=False) as client:
            while not over.is_set():
                ask(client)

    with ThreadPoolExecutor(clients) as pool:
        going = [pool.submit(go) for _ in range(clients)]
        try:
            yield
        finally:
            over.set()
        for each in going:
            each.result()


@contextmanager
def load(base: str, clients: int, body: Any = BODY) -> Iterator[list[int]]:
    """So many clients that ask all the time; yields the status codes that they get."""
    codes = list[int]()
    with asking(lambda client: codes.append(client.post(f"{base}/v1/completions", json=body).status_code), clients):
        yield codes


def test_replicas_follow_the_load_down_to_none_and_back(shared_server: SharedServer, text_package: Path) -> None:
    base = server.start_serving(text_package, ON_DEMAND)
    wait_for_replicas(0)
    reply = httpx.post(f"{base}/v1/completions", json=BODY | {"max_tokens": 1}, timeout=WAIT_S, trust_env=False)
    assert reply.status_code == 200  # it waited for a replica of its own
    with load(base, clients=6) as codes:
        wait_for_replicas(2)
    assert codes
    assert set(codes) == {200}
    with load(base, clients=60) as codes:  # two replicas hold 2 and 32 wait: the others get 429
        wait_until(lambda: 429 in codes)
    assert set(codes) == {200, 429}
    wait_for_replicas(0)


def test_an_update_fails_no_request_and_breaks_no_stream(shared_server: SharedServer, text_package: Path) -> None:
    """A new replica answers before the old one stops, and the old one finishes what it has begun."""
    most = 600
    settings = SETTINGS.model_copy(update={"max_tokens": most + 2})
    base = server.start_serving(text_package, settings)
    events = list[list[str]]()
    body = BODY | {"max_tokens": 40}
    long = BODY | {"stream": True, "max_tokens": most, "logit_bias": {"0": -100}}  # and no end before that

    def stream(client: httpx.Client) -> None:
        with client.stream("POST", f"{base}/v1/completions", json=long) as reply:
            assert reply.status_code == 200
            events.append([line.removeprefix("data: ") for line in reply.iter_lines() if line])

    with load(base, clients=2, body=body) as codes, asking(stream, 2):
        for other in (most + 1, most):
            before = len(events)
            assert server.start_serving(text_package, settings.model_copy(update={"max_tokens": other})) == base
            assert len(events) > before  # one after the other, so one was going on when the old replica stopped
            count = len(codes)
            wait_until(lambda count=count: len(codes) >= count + 10)  # type: ignore[misc]
    assert set(codes) == {200}
    for *_, last, done in events:
        assert done == "[DONE]"
        assert json.loads(last)["choices"][0]["finish_reason"] == "length"
    too_many = httpx.post(f"{base}/v1/completions", json=BODY | {"max_tokens": most + 1}, trust_env=False)
    assert too_many.status_code == 400  # the last update is the one that answers
