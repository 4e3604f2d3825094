"""Several gateways at one port: every one routes by every change, keys have one limit, and one that dies is missed by
nobody who tries again; one that stops says so before it listens no longer.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import ray
from ray import serve

from overproof.serve import api_keys, ray_serve, server
from overproof.serve.application import GATEWAY_NAME
from overproof.serve.controller import describe_version
from overproof.serve.environment import KEYS_VARIABLE
from packing import make_package
from shared_server import SETTINGS, WAIT_S, wait_until

pytestmark = pytest.mark.trial
BODY = {"model": "stdlib-lm", "prompt": [0, 70], "max_tokens": 1}
GATEWAYS, PER_MINUTE, NOTICE_S = 2, 10, 4.0


@pytest.fixture
def packages(tmp_path: Path) -> tuple[Path, Path]:
    return make_package("text", tmp_path / "one"), make_package("text", tmp_path / "two", "seed=1")


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """One without limits, and one with a limit."""
    file = str(tmp_path / "keys.json")
    monkeypatch.setenv(KEYS_VARIABLE, file)
    return api_keys.add_key(file, "free", None, None), api_keys.add_key(file, "few", PER_MINUTE, None)


@pytest.fixture
def no_server(ray_cluster: str) -> Iterator[None]:
    server.stop_serving()
    yield
    server.stop_serving()


def post(base: str, key: str) -> httpx.Response:
    """Over a connection of its own, so through any gateway."""
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.post(f"{base}/v1/completions", json=BODY, headers=headers, timeout=WAIT_S, trust_env=False)


def gateway_actors() -> list[str]:
    prefix = f"{ray_serve.REPLICA_ACTOR}{GATEWAY_NAME}#gateway"
    return [
        name for each in ray.util.list_named_actors(all_namespaces=True) if (name := each["name"]).startswith(prefix)
    ]


def test_gateways_at_one_port(no_server: None, packages: tuple[Path, Path], keys: tuple[str, str]) -> None:
    (one, two), (free, few) = packages, keys
    settings = SETTINGS.model_copy(update={"gateways": GATEWAYS, "drain_notice_s": NOTICE_S, "cpus_per_replica": 0.2})
    base = server.start_serving(one, settings)
    assert len(gateway_actors()) == len(server.call_controller("gateways", frozenset())) == GATEWAYS

    for package in (two, one):
        server.call_controller("deploy", str(package), settings, "stable", "ada")
        expected = describe_version(str(package), settings).package
        assert {post(base, free).json()["package"] for _ in range(40)} == {expected}

    codes = []
    for _ in range(2 * PER_MINUTE):
        codes.append(post(base, few).status_code)
        time.sleep(0.6)  # more than what one gateway takes to hear of another
    assert set(codes) == {200, 429}
    assert PER_MINUTE <= codes.count(200) <= PER_MINUTE + 4  # a minute's, and what has filled up in 12 s

    ray.kill(ray.get_actor(gateway_actors()[0], namespace="serve"))
    wait_until(lambda: len(gateway_actors()) == GATEWAYS)
    wait_until(lambda: all(_status(f"{base}/readyz") == 200 for _ in range(10)))
    assert {post(base, free).status_code for _ in range(20)} == {200}

    stopping = threading.Thread(target=serve.delete, args=(GATEWAY_NAME,))
    stopping.start()
    wait_until(lambda: _status(f"{base}/readyz") == 503)
    assert post(base, free).status_code == 200  # what a balancer sends until it has noticed
    stopping.join()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{base}/readyz", trust_env=False)


def _status(url: str) -> int:
    try:
        return httpx.get(url, timeout=WAIT_S, trust_env=False).status_code
    except httpx.TransportError:
        return 0
