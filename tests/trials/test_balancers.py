"""Load balancers with the settings of docs/serving.md: streams arrive as they are made, and a gateway that is not there
is asked nothing.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from live_server import HOST, live_server

from hosts import REPOSITORY
from overproof.serve.net import free_port
from packing import make_package

pytestmark = pytest.mark.trial
TOKENS, START_S, ASKED = 200, 30.0, 40
BODY = {"prompt": "import os\n", "stream": True, "logit_bias": {"0": -100}, "logprobs": 5}
NGINX = """
daemon off; pid {folder}/pid; error_log {folder}/error.log;
events {{}}
http {{
  access_log off;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  {fragment}
}}
"""
HAPROXY = """
defaults
    timeout connect 5s
    timeout client 310s
frontend all
    mode http
    bind {host}:{port}
    default_backend overproof
{fragment}
"""
SETTINGS = {"nginx": NGINX, "haproxy": HAPROXY}
COMMANDS = {"nginx": ("nginx", "-c"), "haproxy": ("haproxy", "-db", "-f")}


def fragment(balancer: str, port: int, upstreams: tuple[int, int]) -> str:
    """What the page shows, for gateways of this machine."""
    page = (REPOSITORY / "docs/serving.md").read_text()
    found = re.search(rf"^    # {balancer}\.(?:conf|cfg).*\n((?:    .*\n)+)", page, re.MULTILINE)
    assert found
    shown = (
        textwrap.dedent(found[1])
        .replace("listen 80;", f"listen {HOST}:{port};")
        .replace("hdr Host overproof", f"hdr Host {HOST}")
    )
    for address, upstream in zip(("10.0.1.11:8000", "10.0.1.12:8000"), upstreams, strict=True):
        assert address in shown
        shown = shown.replace(address, f"{HOST}:{upstream}")
    return shown


@contextmanager
def started(balancer: str, folder: Path, upstreams: tuple[int, int]) -> Iterator[str]:
    """The address of one in front of two gateways."""
    program, *options = COMMANDS[balancer]
    found = shutil.which(program) or shutil.which(program, path="/usr/sbin")
    if found is None:
        pytest.skip(f"there is no {balancer} here")
    port, config = free_port(HOST, 0), folder / balancer
    shown = fragment(balancer, port, upstreams)
    config.write_text(SETTINGS[balancer].format(folder=folder, host=HOST, port=port, fragment=shown))
    process = subprocess.Popen([found, *options, config])
    try:
        deadline_s = time.monotonic() + START_S
        while True:
            assert process.poll() is None
            try:
                socket.create_connection((HOST, port)).close()
                break
            except OSError:
                assert time.monotonic() < deadline_s
                time.sleep(0.05)
        yield f"http://{HOST}:{port}"
    finally:
        process.terminate()
        process.wait(START_S)


@pytest.fixture(scope="module")
def gateway(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    folder = tmp_path_factory.mktemp("gateway")
    with live_server(
        make_package("text", folder / "store"), ray_cluster, folder / "log", 'proxies=["127.0.0.0/8"]'
    ) as port:
        yield port


@pytest.mark.parametrize("balancer", SETTINGS)
def test_streams_pass_and_a_gateway_that_is_gone_is_left_out(balancer: str, gateway: int, tmp_path: Path) -> None:
    with started(balancer, tmp_path, (gateway, free_port(HOST, 0))) as url, httpx.Client(trust_env=False) as client:
        time.sleep(5)  # two checks
        for _ in range(ASKED):
            assert client.post(f"{url}/v1/completions", json=BODY | {"max_tokens": 1}, timeout=60).status_code == 200
        with client.stream("POST", f"{url}/v1/completions", json=BODY | {"max_tokens": TOKENS}, timeout=60) as reply:
            assert reply.status_code == 200
            parts = list(reply.iter_raw())
    text = b"".join(parts)
    assert text.count(b"data: {") >= TOKENS
    assert b"data: [DONE]" in text
    assert len(parts) > TOKENS / 2
    whole = sum(part.endswith(b"\n\n") for part in parts)  # an event or a few, where a buffer ends anywhere
    assert whole > 0.9 * len(parts)
    assert json.loads(text.split(b"data: ")[1])["choices"]
