"""Streams through a real nginx with its own settings: they arrive as they are made."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from live_server import HOST, live_server

from overproof.serve.net import free_port
from packing import make_package

pytestmark = pytest.mark.trial
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
TOKENS, START_S = 200, 30.0
CONFIG = """
daemon off; pid {folder}/pid; error_log {folder}/error.log;
events {{}}
http {{
  access_log off;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  server {{
    listen {host}:{port};
    location / {{ proxy_pass http://{host}:{upstream}; }}
  }}
}}
"""


@contextmanager
def nginx(folder: Path, upstream: int) -> Iterator[int]:
    assert NGINX is not None
    port, config = free_port(HOST, 0), folder / "nginx.conf"
    config.write_text(CONFIG.format(folder=folder, host=HOST, port=port, upstream=upstream))
    process = subprocess.Popen([NGINX, "-p", folder, "-c", config])
    try:
        deadline_s = time.monotonic() + START_S
        while True:
            assert process.poll() is None, (folder / "error.log").read_text()
            try:
                socket.create_connection((HOST, port)).close()
                break
            except OSError:
                assert time.monotonic() < deadline_s
                time.sleep(0.05)
        yield port
    finally:
        process.terminate()
        process.wait(START_S)


def stream(port: int) -> list[bytes]:
    """The parts in which a streamed completion arrives."""
    body = json.dumps({
        "prompt": "import os\n", "max_tokens": TOKENS, "stream": True, "logit_bias": {"0": -100},
        "logprobs": 5,
    }).encode()  # fmt: skip
    head = f"POST /v1/completions HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    parts = []
    with socket.create_connection((HOST, port), timeout=60) as client:
        client.sendall(f"{head}\r\n".encode() + body)
        while part := client.recv(1 << 20):
            parts.append(part)
    return parts


@pytest.mark.skipif(NGINX is None, reason="there is no nginx here")
def test_a_stream_passes_nginx_token_by_token(ray_cluster: str, tmp_path: Path) -> None:
    package = make_package("text", tmp_path / "store")
    with live_server(package, ray_cluster, tmp_path / "log") as upstream, nginx(tmp_path, upstream) as port:
        parts = stream(port)
    text = b"".join(parts)
    assert text.startswith(b"HTTP/1.1 200"), text[:500]
    assert text.count(b"data: {") >= TOKENS
    assert b"data: [DONE]" in text
    assert len(parts) > TOKENS / 2
    whole = sum(part.endswith(b"\n\n") for part in parts)  # an event or a few, where nginx's buffers end anywhere
    assert whole > 0.9 * len(parts)
