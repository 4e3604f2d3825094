"""Where requests come from: names that the server is called by, web pages, and proxies."""

from __future__ import annotations

import asyncio
import hashlib
import socket
from pathlib import Path
from typing import Any

import pytest

from overproof.config import Serve
from overproof.engines.onnx_runtime import OnnxRuntime
from overproof.errors import InputError
from overproof.serve.application import require_keys
from overproof.serve.middleware import Access
from overproof.serve.model_registry import SingleModel
from overproof.serve.request_source import SourcePolicy, SourceRefused, parse_authority
from overproof.serve.responses import ErrorReply
from overproof.serve.routes import build_app
from single_model import listening, one

OPEN, KEYED = Access(), Access(hashlib.sha256(b"secret").hexdigest())
BEARER = ("Authorization", "Bearer secret")
Headers = list[tuple[str, str]]


@pytest.fixture(scope="module")
def digits(digits_package: Path) -> SingleModel:
    return one(digits_package, OnnxRuntime(digits_package / "model.onnx"))


def send(
    app: Any, headers: Headers, method: str = "GET", path: str = "/v1/models", peer: str | None = "127.0.0.1",
    version: str = "1.1",
) -> tuple[int, list[tuple[str, str]], bytes, Any]:  # fmt: skip
    """Status, headers and body of a reply, and the client that the application saw."""
    sent: list[Any] = []
    scope = {
        "type": "http", "http_version": version, "method": method, "path": path, "query_string": b"",
        "headers": [(name.lower().encode(), value.encode()) for name, value in headers],
        "client": None if peer is None else (peer, 1),
    }  # fmt: skip

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def note(message: Any) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, note))
    found = [(name.decode(), value.decode()) for name, value in sent[0]["headers"]]
    return sent[0]["status"], found, b"".join(each.get("body", b"") for each in sent[1:]), scope["client"]


def status(app: Any, *headers: tuple[str, str], **request: Any) -> int:
    return send(app, list(headers), **request)[0]


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("localhost", ("localhost", None)),
        ("LocalHost.:8000", ("localhost", "8000")),
        ("127.0.0.1:1", ("127.0.0.1", "1")),
        ("[::1]:80", ("::1", "80")),
        ("[0:0:0:0:0:0:0:1]", ("::1", None)),
        ("[::ffff:127.0.0.1]", ("127.0.0.1", None)),
        *((bad, None) for bad in ("", "::1", "[::1", "a b", "a:", "a:99999", "a:-1", "a@b", "a/b", "a,b", "[x]", "é")),
    ],
)
def test_a_host_is_a_name_or_an_address_and_a_port(text: str, parsed: Any) -> None:
    assert parse_authority(text) == parsed


def test_without_a_key_requests_name_this_machine(digits: SingleModel) -> None:
    """A name that an attacker resolves to this machine (DNS rebinding) is none of its own."""
    settings = Serve(host="::1", hosts=("models.example.org", "10.1.2.3"))
    plain, named = build_app(digits, OPEN), build_app(digits, OPEN, source=SourcePolicy.of(settings))
    for good in ("localhost", "LOCALHOST:8000", "127.0.0.1:9", "127.9.9.9", "[::1]:8000", "[::ffff:7f00:1]"):
        assert status(plain, ("Host", good)) == 200, good
    for other in ("evil.example", "evil.example:8000", "localhost.evil.example", "10.1.2.3", "0.0.0.0", "[2001:db8::1]",
                  "127.0.0.1.evil.example", "models.example.org"):  # fmt: skip
        for path in ("/v1/models", "/healthz", "/docs", "/metrics"):
            code, _, body, _ = send(plain, [("Host", other)], path=path)
            assert (code, ErrorReply.model_validate_json(body).error.type) == (403, "permission_error"), other
    for good in ("models.example.org", "Models.Example.ORG.:80", "10.1.2.3:8000", "[0::1]"):
        assert status(named, ("Host", good)) == 200, good
    assert status(named, ("Host", "example.org")) == 403


@pytest.mark.parametrize("access", [OPEN, KEYED])
def test_a_request_names_one_host(digits: SingleModel, access: Access) -> None:
    app = build_app(digits, access)
    for hosts in ((), ("localhost", "localhost"), ("localhost", "evil.example"), ("local host",), ("[::1",), ("",)):
        assert status(app, *(("Host", host) for host in hosts), BEARER) == 400, hosts
    old = status(app, BEARER, version="1.0")  # which need not name one, and no browser sends
    assert old == (200 if access.needs_key else 400)


def test_with_a_key_any_name_will_do_unless_some_are_given(digits: SingleModel) -> None:
    assert status(build_app(digits, KEYED), ("Host", "any.example"), BEARER) == 200
    given = SourcePolicy.of(Serve(host="0.0.0.0", hosts=("models.example.org",)))
    app = build_app(digits, KEYED, source=given)
    codes = [status(app, ("Host", host), BEARER) for host in ("any.example", "models.example.org", "localhost")]
    assert codes == [403, 200, 200]
    for path in ("/healthz", "/readyz"):  # of a probe, by the address
        assert status(app, ("Host", "10.0.0.9:8000"), path=path) == 200


def test_without_a_key_pages_of_elsewhere_may_not_ask(digits: SingleModel) -> None:
    app = build_app(digits, OPEN)
    host = ("Host", "localhost:8000")
    for own in ("http://localhost:8000", "https://localhost:8000"):
        assert status(app, host, ("Origin", own)) == 200, own
    assert status(app, ("Host", "localhost"), ("Origin", "http://localhost:80")) == 200
    assert status(app, ("Host", "[::1]:8000"), ("Origin", "http://[::1]:8000")) == 200
    for other in ("https://evil.example", "http://localhost:3000", "http://localhost", "null", "", "file://",
                  "http://127.0.0.1:8000", "http://localhost:8000.evil.example"):  # fmt: skip
        for method in ("GET", "POST", "OPTIONS"):
            code, headers, _, _ = send(app, [host, ("Origin", other)], method=method)
            assert code == 403, other
            assert not [name for name, _ in headers if name.startswith("access-control")]
    assert status(app, host, ("Origin", "http://localhost:8000"), ("Origin", "https://evil.example")) == 403


def test_without_a_key_what_a_proxy_passes_on_is_refused(digits: SingleModel) -> None:
    """It may be anybody's, and its Host is what the proxy was told to say."""
    host = ("Host", "127.0.0.1:8000")
    for name in ("X-Forwarded-For", "Forwarded", "X-Real-IP", "Via", "X-Forwarded-Host", "CF-Connecting-IP"):
        for value in ("127.0.0.1", "for=127.0.0.1", "192.0.2.7", ""):
            assert status(build_app(digits, OPEN), host, (name, value)) == 403
    app = build_app(digits, OPEN, source=SourcePolicy(proxies=("127.0.0.1/32",)))
    assert status(app, host) == 200
    assert status(app, host, ("X-Forwarded-For", "127.0.0.1")) == 200
    assert status(app, host, ("X-Forwarded-For", "192.0.2.7")) == 403
    assert status(app, host, ("X-Forwarded-For", "127.0.0.1"), peer="192.0.2.7") == 403
    assert status(app, host, ("X-Forwarded-For", "127.0.0.1"), peer="10.0.0.1") == 403
    assert status(app, host, peer=None) == 403


PROXIES = SourcePolicy(proxies=("10.0.0.0/8", "::1"))


@pytest.mark.parametrize(
    ("peer", "headers", "client"),
    [
        ("192.0.2.7", [("X-Forwarded-For", "198.51.100.1")], "192.0.2.7"),  # it is no proxy of ours
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", [("X-Forwarded-For", "198.51.100.1")], "198.51.100.1"),
        ("10.0.0.1", [("X-Forwarded-For", "127.0.0.1, 198.51.100.1")], "198.51.100.1"),  # the client wrote the first
        ("10.0.0.1", [("X-Forwarded-For", "127.0.0.1"), ("X-Forwarded-For", "198.51.100.1, 10.0.0.2")], "198.51.100.1"),
        ("::1", [("X-Forwarded-For", "[2001:db8::1]:4711")], "2001:db8::1"),
        ("::1", [("X-Forwarded-For", "198.51.100.1:80")], "198.51.100.1"),
        ("10.0.0.1", [("X-Forwarded-For", "unknown")], None),
        ("10.0.0.1", [("X-Forwarded-For", "127.0.0.1, ")], None),
        ("10.0.0.1", [("Forwarded", 'for=127.0.0.1, For="[2001:db8::1]:80";proto=https;by=10.0.0.1')], "2001:db8::1"),
        ("10.0.0.1", [("Forwarded", "proto=https")], None),
        ("10.0.0.1", [("Forwarded", "for=198.51.100.1"), ("X-Forwarded-For", "198.51.100.1")], "198.51.100.1"),
        ("::ffff:10.0.0.1", [("X-Forwarded-For", "198.51.100.1")], "198.51.100.1"),
    ],
)
def test_a_clients_address_is_told_by_proxies_that_are_named(peer: str, headers: Headers, client: str | None) -> None:
    scope: Any = {
        "client": (peer, 1), "headers": [(name.lower().encode(), value.encode()) for name, value in headers],
    }  # fmt: skip
    assert PROXIES.client(scope) == client


def test_the_log_and_the_keys_see_the_client_behind_a_proxy(digits: SingleModel) -> None:
    app = build_app(digits, KEYED, source=PROXIES)
    given = [("Host", "models.example.org"), BEARER, ("X-Forwarded-For", "198.51.100.1")]
    assert send(app, given, peer="10.0.0.1")[::3] == (200, ("198.51.100.1", 0))
    assert send(app, given, peer="192.0.2.7")[::3] == (200, ("192.0.2.7", 1))
    contradicting = [*given, ("Forwarded", "for=198.51.100.2")]
    assert send(app, contradicting, peer="10.0.0.1")[0] == 400
    with pytest.raises(SourceRefused, match="two clients"):
        PROXIES.client(
            {"client": ("10.0.0.1", 1), "headers": [(b"forwarded", b"for=_x"), (b"x-forwarded-for", b"1.2.3.4")]}
        )


PAGE = "https://app.example.org"


def test_pages_of_configured_origins_hear_what_browsers_want(digits: SingleModel) -> None:
    app = build_app(digits, KEYED, source=SourcePolicy(origins=(PAGE,)))
    host = ("Host", "models.example.org")
    asked: Headers = [
        ("Access-Control-Request-Method", "POST"),
        ("Access-Control-Request-Headers", "authorization,content-type,x-stainless-os"),
    ]
    code, found, _, _ = send(app, [host, ("Origin", PAGE), *asked], "OPTIONS", "/v1/completions")  # without a key
    headers = dict(found)
    assert code == 200
    assert headers["access-control-allow-origin"] == PAGE
    assert headers["access-control-allow-headers"] == "authorization,content-type,x-stainless-os"
    assert {"GET", "HEAD", "POST"} == set(headers["access-control-allow-methods"].split(", "))
    assert "Origin" in headers["vary"]
    assert "access-control-allow-credentials" not in headers
    code, found, _, _ = send(app, [host, ("Origin", "https://evil.example"), *asked], "OPTIONS", "/v1/completions")
    assert (code, "access-control-allow-origin" in dict(found)) == (400, False)
    for given, expected in (([BEARER], 200), ([], 401)):  # a page is to be able to read why not
        for method in ("GET", "HEAD"):
            code, found, _, _ = send(app, [host, ("Origin", PAGE), *given], method)
            headers = dict(found)
            assert (code, headers["access-control-allow-origin"]) == (expected, PAGE)
            assert "x-request-id" in headers["access-control-expose-headers"]
            assert "Origin" in headers["vary"]
    code, found, _, _ = send(app, [host, BEARER])
    assert (code, "Origin" in dict(found)["vary"]) == (200, True)  # for caches
    code, found, _, _ = send(app, [host, BEARER, ("Origin", "https://evil.example")])
    assert "access-control-allow-origin" not in dict(found)
    other = build_app(digits, OPEN, source=SourcePolicy(origins=(PAGE,)))
    assert status(other, ("Host", "localhost:1"), ("Origin", PAGE)) == 200
    assert status(other, ("Host", "localhost:1"), ("Origin", "https://evil.example")) == 403


def test_a_failure_is_told_to_a_page_too(digits_package: Path) -> None:
    class Broken:
        def logprobs(self, _: Any) -> Any:
            raise RuntimeError

        def check(self) -> None:
            raise RuntimeError

    app = build_app(one(digits_package, Broken()), OPEN, source=SourcePolicy(origins=(PAGE,)))
    code, found, _, _ = send(app, [("Host", "localhost"), ("Origin", PAGE)], path="/healthz")
    assert (code, dict(found)["access-control-allow-origin"]) == (500, PAGE)


def test_cors_is_off_unless_configured(digits: SingleModel) -> None:
    for access in (OPEN, KEYED):
        code, found, _, _ = send(
            build_app(digits, access),
            [("Host", "localhost"), ("Origin", PAGE), ("Access-Control-Request-Method", "POST")],
            "OPTIONS",
        )
        assert (code, [name for name, _ in found if "access-control" in name]) == (401 if access.needs_key else 403, [])


def test_every_origin_may_ask_only_with_a_key() -> None:
    with pytest.raises(InputError, match=r"serve.origins: found '\*' without an API key"):
        require_keys(Serve(origins=("*",)), OPEN)
    require_keys(Serve(origins=("*",)), KEYED)


@pytest.mark.parametrize(
    ("field", "value"),
    [("hosts", "a:8000"), ("hosts", "http://a"), ("proxies", "nginx"), ("origins", "app.example.org"), ("origins", "https://a/")],
)  # fmt: skip
def test_settings_are_looked_at(field: str, value: str) -> None:
    with pytest.raises(InputError, match=f"serve: {field}: .*expected"):
        Serve.parse({field: [value]})


def test_head_is_get_without_its_body(digits: SingleModel) -> None:
    """Over a socket: a body that is sent all the same would be the next reply's begin."""
    with listening(build_app(digits, OPEN)) as address:
        _, _, port = address.rpartition(":")
        with socket.create_connection(("127.0.0.1", int(port)), timeout=30) as connection:
            for path in ("/healthz", "/v1/models"):
                connection.sendall(f"HEAD {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            received = b"".join(iter(lambda: connection.recv(65536), b""))
    assert received.count(b"HTTP/1.1 200") == 3
    assert received.count(b'{"status":"ok"}') == 1
