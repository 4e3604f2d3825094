"""Who may ask, and how much: checked before a request reaches an engine.

The one file of `serve` that reads the environment.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import math
import os
from dataclasses import dataclass
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from overproof.errors import InputError
from overproof.files import absolute_uri
from overproof.serve.api_keys import ApiKey, KeyStore, RateLimiter, hash_key, read_keys
from overproof.serve.responses import ErrorDetail, ErrorReply, Usage
from overproof.serve.traffic import Recorder

KEY_VARIABLE = "OVERPROOF_API_KEY"
KEYS_VARIABLE = "OVERPROOF_KEYS"
MOST_BODY_BYTES = 4 << 20
MOST_BODY_SECONDS = 30
MOST_SECONDS = 300
TOO_LARGE = f"the body is larger than {MOST_BODY_BYTES} bytes; send less at a time"
KEY_IN_SCOPE = "overproof.key"  # of an ASGI request: the key that pays for its tokens
OPEN_PATHS = ("/healthz",)
DOCS = ("/docs", "/openapi.json", "/static-offline-docs/")  # no secret, and a browser sends no key for them
# Ray Serve lets a client lift its time limit and outlive its disconnection.
REFUSED_HEADERS = (b"x-request-timeout-seconds", b"x-request-disconnect-disabled")


@dataclass(frozen=True)
class Access:
    """What a request must carry: the key with this hash (the key itself stays where it was set), or one of a file."""

    key_sha256: str | None = None
    keys_uri: str | None = None

    @property
    def keyed(self) -> bool:
        return not (self.key_sha256 is None and self.keys_uri is None)


def api_key() -> str | None:
    """The key that requests may carry, from the environment; None where it is not set or empty."""
    return os.environ.get(KEY_VARIABLE) or None


def load_access() -> Access:
    """What the environment asks for.

    Raises:
        InputError: the file of keys cannot be read, or holds none.
    """
    key, uri = api_key(), os.environ.get(KEYS_VARIABLE) or None
    if uri is not None:
        uri = absolute_uri(uri)
        if not read_keys(uri).keys:
            raise InputError(f"{KEYS_VARIABLE}: {uri} holds no key; make one: `overproof keys add NAME`")
    return Access(None if key is None else hash_key(key), uri)


def is_loopback(host: str) -> bool:
    """Whether an address reaches this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class AuthMiddleware:
    """ASGI middleware that refuses with one JSON error.

    With a key, every path but ``/healthz`` and the docs needs it. Without one, clients of other machines are refused,
    whatever address Serve was told to listen on.
    """

    def __init__(self, app: ASGIApp, access: Access, beside: Telemetry) -> None:
        self._app, self._access, self._beside = app, access, beside
        self._keys = None if access.keys_uri is None else KeyStore(access.keys_uri)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it here."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = self._malformed(scope) or await self._refusal(scope)
        if refusal is None:
            await self._pass_on(scope, _Body(receive), send)
        else:
            await refusal(scope, receive, send)

    async def _pass_on(self, scope: Scope, body: _Body, send: Send) -> None:
        begun = False

        async def sent(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            async with asyncio.timeout(MOST_SECONDS):
                await self._app(scope, body.receive, sent)
        except TimeoutError:
            late = error_response(408, f"not done in {MOST_SECONDS} s; ask for less at a time", "timeout_error")
            if begun:  # a stream, which then says it in its last event
                await send({"type": "http.response.body", "body": b"data: " + bytes(late.body) + b"\n\n"})
            else:
                await late(scope, body.receive, send)

    def _malformed(self, scope: Scope) -> JSONResponse | None:
        headers = dict(scope["headers"])
        for name in REFUSED_HEADERS:
            if name in headers:
                return error_response(400, f"header {name.decode()} is not accepted; leave it out")
        announced = headers.get(b"content-length", b"0")
        if not announced.isdigit() or int(announced) > MOST_BODY_BYTES:
            return error_response(413, TOO_LARGE)
        return None

    async def _refusal(self, scope: Scope) -> JSONResponse | None:
        if scope["path"] in OPEN_PATHS:
            return None
        if not self._access.keyed:
            host = (scope["client"] or ("an unknown address",))[0]
            if is_loopback(host):
                return None
            message = f"requests from {host} need an API key, and none is set; set {KEY_VARIABLE} where Serve starts"
            return error_response(403, message, kind="permission_error")
        if scope["path"].startswith(DOCS):
            return None
        presented = _presented_sha256(dict(scope["headers"]))
        if hmac.compare_digest(presented, self._access.key_sha256 or ""):
            return None
        key = await asyncio.to_thread(self._keys.find, presented) if self._keys else None
        if key is None:
            return error_response(
                401,
                "expected the header 'Authorization: Bearer KEY' with an API key of this server",
                kind="authentication_error",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if key.limits:
            wait_s = self._beside.admit(key)
            if wait_s > 0:
                return error_response(
                    429,
                    f"key {key.name!r} has used up its limit of a minute; ask again in {wait_s:.0f} s",
                    kind="rate_limit_error",
                    headers={"Retry-After": str(math.ceil(wait_s))},
                )
            scope[KEY_IN_SCOPE] = key
        return None


class _Body:
    """Counts a body that announced no length, and waits for none for long."""

    def __init__(self, receive: Receive) -> None:
        self._receive, self._read_bytes, self._whole = receive, 0, False
        self._due = asyncio.get_running_loop().time() + MOST_BODY_SECONDS

    async def receive(self) -> Message:
        try:
            async with asyncio.timeout_at(None if self._whole else self._due):
                message = await self._receive()
        except TimeoutError:
            raise HTTPException(408, f"the body did not come in {MOST_BODY_SECONDS} s") from None
        self._whole = not message.get("more_body", False)
        self._read_bytes += len(message.get("body", b""))
        if self._read_bytes > MOST_BODY_BYTES:
            raise HTTPException(413, TOO_LARGE)
        return message


def error_response(
    status: int,
    message: str,
    kind: str = "invalid_request_error",
    param: str | None = None,
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    """The one shape of every refusal."""
    content: dict[str, Any] = ErrorReply(error=ErrorDetail(message=message, type=kind, param=param)).model_dump()
    return JSONResponse(content, status, headers)


def _presented_sha256(headers: dict[bytes, bytes]) -> str:
    scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
    return hash_key(key.strip().decode("latin-1") if scheme.lower() == b"bearer" else "")


class Telemetry:
    """The process alone."""

    def __init__(self, meter: RateLimiter | None = None, recorder: Recorder | None = None) -> None:
        self._meter, self.recorder = meter or RateLimiter(), recorder  # of traffic, where it is kept

    def admit(self, key: ApiKey) -> float:
        """0 where a request with this key may pass, else the seconds to wait."""
        return self._meter.admit(key)

    def used(self, package: str, key: ApiKey | None, usage: Usage) -> None:  # noqa: ARG002
        """What a request came to, however it ended."""
        if key is not None:
            self._meter.charge(key, usage.total_tokens)

    def began(self, package: str, seconds: float) -> None:
        """A stream sent its first event so long after the request."""

    async def metrics(self) -> str:
        """Figures in Prometheus' text format."""
        return ""

    def close(self) -> None:
        """Serving ends."""
        if self.recorder is not None:
            self.recorder.close()
