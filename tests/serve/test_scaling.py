"""Replicas that come and go with the load, down to none."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx

from overproof.config import Serve
from overproof.serve import controller, server

SETTINGS = Serve(
    port=0, min_replicas=0, max_replicas=2, cpus_per_replica=0.2, slots=1, upscale_delay_s=0.5, downscale_delay_s=2.0
)
WAIT_S = 90
BODY = {"prompt": [0, 70], "max_tokens": 200, "temperature": 2.0}


def replicas() -> int:
    """Those that answer."""
    (package,) = server.call_controller("deployments").models["stdlib-lm"].versions
    return controller.count_replicas(package.package)


def until(count: int) -> None:
    deadline = time.monotonic() + WAIT_S
    while replicas() != count:
        assert time.monotonic() < deadline, f"{replicas()} replicas, {count} expected"
        time.sleep(0.2)


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
def load(base: str, clients: int) -> Iterator[list[int]]:
    """So many clients that ask all the time; yields the status codes that they get."""
    codes = list[int]()
    with asking(lambda client: codes.append(client.post(f"{base}/v1/completions", json=BODY).status_code), clients):
        yield codes


def test_replicas_follow_the_load_down_to_none_and_back(ray_cluster: str, text_package: Path) -> None:
    base = server.start_serving(text_package, SETTINGS)
    try:
        until(0)
        reply = httpx.post(f"{base}/v1/completions", json=BODY | {"max_tokens": 1}, timeout=WAIT_S, trust_env=False)
        assert reply.status_code == 200  # it waited for a replica of its own
        with load(base, clients=6) as codes:
            until(2)
        assert codes
        assert set(codes) == {200}
        with load(base, clients=60) as codes:  # two replicas hold 4 and 16 wait: the others are told to come back
            deadline = time.monotonic() + WAIT_S
            while 429 not in codes:
                assert time.monotonic() < deadline
                time.sleep(0.1)
        assert set(codes) == {200, 429}
        until(0)
    finally:
        server.stop_serving()


def test_an_update_fails_no_request_and_breaks_no_stream(ray_cluster: str, text_package: Path) -> None:
    """A new replica answers before the old one goes, and the old one ends what it has begun."""
    most = 1900
    always = SETTINGS.model_copy(update={"min_replicas": 1, "max_replicas": 1, "max_tokens": most + 2})
    base = server.start_serving(text_package, always)
    events = list[list[str]]()
    long = BODY | {"stream": True, "max_tokens": most, "logit_bias": {"0": -100}}  # and no end before that

    def stream(client: httpx.Client) -> None:
        with client.stream("POST", f"{base}/v1/completions", json=long) as reply:
            assert reply.status_code == 200
            events.append([line.removeprefix("data: ") for line in reply.iter_lines() if line])

    try:
        with load(base, clients=2) as codes, asking(stream, 2):
            for other in (most + 1, most):
                before = len(events)
                assert server.start_serving(text_package, always.model_copy(update={"max_tokens": other})) == base
                assert len(events) > before  # one after the other, so one was going on when the old replica went
                count = len(codes)
                while len(codes) < count + 20:
                    time.sleep(0.05)
        assert set(codes) == {200}
        for *_, last, done in events:
            assert done == "[DONE]"
            assert json.loads(last)["choices"][0]["finish_reason"] == "length"
        too_many = httpx.post(f"{base}/v1/completions", json=BODY | {"max_tokens": most + 1}, trust_env=False)
        assert too_many.status_code == 400  # the last update is the one that answers
    finally:
        server.stop_serving()
