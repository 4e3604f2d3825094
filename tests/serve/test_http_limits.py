"""Connections whose clients do nothing, or too much, come to an end in every state, over real sockets."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import uvicorn
import uvloop

from certificates import certificate
from overproof.config import Serve
from overproof.serve import http_limits, tls_server
from overproof.serve.http_limits import LimitedHttpProtocol
from overproof.serve.net import tls_context, tls_trust
from overproof.serve.tls_server import TlsServer

SOON_S = 20.0
LARGE = 16 << 20  # more than the sockets' buffers hold


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Refuses without a key before it has read the body; else as much as the path says."""
    refused = scope["path"] == "/refused"
    body = b"x" * (LARGE if scope["path"] == "/large" else 2)
    if not refused:
        while (await receive()).get("more_body"):
            pass
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 401 if refused else 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, int]]:
    for name in ("HEADER_TIMEOUT_S", "BODY_TIMEOUT_S", "READ_TIMEOUT_S", "LINGER_S"):
        monkeypatch.setattr(http_limits, name, 0.5)
    with serving(asyncio.run) as address:
        yield address


@contextmanager
def serving(run: Callable[[Any], Any], context: ssl.SSLContext | None = None) -> Iterator[tuple[str, int]]:
    listening = socket.create_server(("127.0.0.1", 0))
    listening.setblocking(False)
    config = uvicorn.Config(app, http=LimitedHttpProtocol, lifespan="off", log_config=None, timeout_keep_alive=1)
    server = uvicorn.Server(config) if context is None else TlsServer(config, context)
    thread = threading.Thread(target=lambda: run(server.serve([listening])))
    thread.start()
    yield listening.getsockname()
    server.should_exit = True
    thread.join()


@pytest.fixture(params=[asyncio.run, uvloop.run], ids=["asyncio", "uvloop, as Ray has it"])
def tls_address(
    address: object, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, int, Any]]:
    """And what a client trusts."""
    monkeypatch.setattr(tls_server, "HANDSHAKE_TIMEOUT_S", 1.0)
    chain, key = certificate(tmp_path)
    settings = Serve(tls_certificate=chain, tls_key=key)
    with serving(request.param, tls_context(settings)) as (host, port):
        yield host, port, tls_trust(settings)


def read_to_end(client: socket.socket) -> bytes:
    """All that comes until the server closes the connection; fails where it never does."""
    client.settimeout(SOON_S)
    parts = []
    try:
        while part := client.recv(1 << 20):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def ask(client: socket.socket) -> bytes:
    client.settimeout(SOON_S)
    client.sendall(GET)
    reply = b""
    while not reply.endswith(b"xx"):
        reply += client.recv(1000)
    return reply


def await_no_connection() -> None:
    await_connections(0)


def await_connections(count: int) -> None:
    deadline_s = time.monotonic() + SOON_S
    while http_limits.OPEN.total() != count:
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def trickle(client: socket.socket) -> None:
    deadline_s = time.monotonic() + SOON_S
    while time.monotonic() < deadline_s:
        time.sleep(0.05)
        client.sendall(b"c")


GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: %s\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
POST = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nab"


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"", b"408"),
        (b"\r\n", b"408"),
        (b"GET / HTTP/1.1\r\nHos", b"408"),
        (b"GET / HTTP/1.1\r\nX: " + b"y" * 70_000, b"431"),
        (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 5_000 + b"\r\n", b"431"),
        (b"GET / HTTP/1.1\r\nX: " + b"y" * 70_000 + b"\r\n\r\n", b"431"),
        (b"nonsense\r\n\r\n", b"400"),
        (GET, b"200"),
        (GET + b"\r\n", b"200"),
        (GET + b"GET", b"200"),
        (POST % b"/refused", b"401"),
        (POST % b"/", b""),
    ],
)
def test_every_connection_comes_to_an_end(address: tuple[str, int], sent: bytes, status: bytes) -> None:
    with socket.create_connection(address) as client:
        client.sendall(sent)
        assert read_to_end(client)[9:12] == status


@pytest.mark.parametrize("path", [b"/refused", b"/"])
def test_a_body_that_trickles_ends_with_its_deadline(address: tuple[str, int], path: bytes) -> None:
    with socket.create_connection(address) as client:
        client.sendall(POST % path)
        with pytest.raises(OSError, match=r"Broken pipe|reset"):
            trickle(client)


@pytest.mark.parametrize("path", [b"/", b"/refused"])
def test_a_body_in_crumbs_ends_its_connection(address: tuple[str, int], path: bytes) -> None:
    """And one in as many parts as there may be is taken."""
    head = b"POST %s HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" % path
    with socket.create_connection(address) as client:
        client.sendall(head)
        with suppress(OSError):
            client.sendall(b"1\r\nx\r\n" * 100_000)
        assert not read_to_end(client).startswith(b"HTTP/1.1 200")
    await_no_connection()
    with socket.create_connection(address) as client:
        client.sendall(head + b"1\r\nx\r\n" * http_limits.MAX_PARTS + b"0\r\n\r\n")
        assert read_to_end(client).startswith(b"HTTP/1.1 401" if path == b"/refused" else b"HTTP/1.1 200")


def test_requests_are_not_sent_ahead_without_end(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as client:
        client.sendall(GET * 20 + GET.replace(b"Host", b"Connection: close\r\nHost"))
        assert read_to_end(client).count(b"200 OK") == 21
    with socket.create_connection(address) as client:
        client.sendall(GET * 1_000)
        assert read_to_end(client).count(b"200 OK") <= 1  # what was begun


def test_upgrades_leave_no_connection_behind(address: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is answered as any request, and counts no longer when it is closed."""
    monkeypatch.setattr(http_limits, "MAX_PER_ADDRESS", 3)
    for protocol in (b"websocket", b"h2c") * 4:
        with socket.create_connection(address) as client:
            client.sendall(UPGRADE % protocol)
            assert read_to_end(client)[9:12] == b"200"
        await_no_connection()


def test_after_a_reply_an_empty_line_holds_nothing_open(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as client:
        assert b"200" in ask(client)
        client.sendall(b"\r\n")
        read_to_end(client)


def test_a_client_that_never_reads_is_left(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as client:
        client.sendall(GET.replace(b"/", b"/large", 1))
        assert client.recv(12)[9:12] == b"200"
        await_no_connection()
        assert len(read_to_end(client)) < LARGE


@pytest.mark.parametrize("limit", ["MAX_PER_ADDRESS", "MAX_CONNECTIONS"])
def test_one_connection_too_many_is_refused_and_the_others_go_on(
    address: tuple[str, int], monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setattr(http_limits, limit, 2)
    clients = [socket.create_connection(address) for _ in range(2)]
    assert all(b"200" in ask(client) for client in clients)
    with socket.create_connection(address) as third:
        assert read_to_end(third)[9:12] == b"503"
    for client in clients:
        assert b"200" in ask(client)
        client.close()
    await_no_connection()
    with socket.create_connection(address) as again:
        assert b"200" in ask(again)


@pytest.mark.parametrize("sent", [b"", b"\x16\x03\x01", GET, b"\x16\x03\x01\x00\x05hello"])
def test_handshakes_that_never_end_are_counted_and_ended(
    tls_address: tuple[str, int, Any], monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(http_limits, "MAX_PER_ADDRESS", 3)
    host, port, trust = tls_address
    silent = [socket.create_connection((host, port)) for _ in range(3)]
    await_connections(3)
    with socket.create_connection((host, port)) as fourth:
        assert read_to_end(fourth) == b""
    for client in silent:
        client.sendall(sent)
    for client in silent:
        read_to_end(client)
        client.close()
    await_no_connection()
    with socket.create_connection((host, port)) as raw, trust.wrap_socket(raw) as client:
        assert b"200" in ask(client)


def test_what_comes_with_the_end_of_a_handshake_is_answered(tls_address: tuple[str, int, Any]) -> None:
    """Request and the client's last message of the handshake in one packet."""
    host, port, trust = tls_address
    for _ in range(20):
        coming, going = ssl.MemoryBIO(), ssl.MemoryBIO()
        secured = trust.wrap_bio(coming, going)
        with socket.create_connection((host, port)) as raw:
            raw.settimeout(SOON_S)
            with suppress(ssl.SSLWantReadError):
                secured.do_handshake()
            raw.sendall(going.read())
            while True:
                coming.write(raw.recv(1 << 16))
                try:
                    secured.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    continue
            secured.write(GET)
            raw.sendall(going.read())
            reply = b""
            while not reply.endswith(b"xx"):
                try:
                    reply += secured.read(1000)
                except ssl.SSLWantReadError:
                    coming.write(raw.recv(1 << 16))
            assert reply[9:12] == b"200"


def test_over_tls_connections_have_the_same_limits(
    tls_address: tuple[str, int, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    host, port, trust = tls_address
    with socket.create_connection((host, port)) as raw, trust.wrap_socket(raw) as client:
        assert b"200" in ask(client)
        client.sendall(b"GET / HTTP/1.1\r\nHos")
        assert read_to_end(client)[9:12] == b"408"
    await_no_connection()
    monkeypatch.setattr(http_limits, "MAX_CONNECTIONS", 1)
    with socket.create_connection((host, port)) as raw, trust.wrap_socket(raw) as client:
        assert b"200" in ask(client)
        with socket.create_connection((host, port)) as second:
            assert read_to_end(second) == b""
        assert b"200" in ask(client)
