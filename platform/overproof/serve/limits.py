"""Who may ask, and how much: checked before a request reaches an engine.

The one file of `serve` that reads the environment.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
from dataclasses import dataclass
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from overproof.serve.schema import ErrorDetail, ErrorReply

KEY_VARIABLE = "OVERPROOF_API_KEY"
MOST_BODY_BYTES = 4 << 20
TOO_LARGE = f"the body is larger than {MOST_BODY_BYTES} bytes; send less at a time"
OPEN_PATHS = ("/healthz",)
# Ray Serve lets a client lift its time limit and outlive its disconnection.
REFUSED_HEADERS = (b"x-request-timeout-seconds", b"x-request-disconnect-disabled")


@dataclass(frozen=True)
class Access:
    """The sha256 of the API key, so that the key itself stays in the process that was given it; None means no key."""

    key_sha256: str | None


def api_key() -> str | None:
    """The key that requests must carry, from the environment; None where it is not set or empty."""
    return os.environ.get(KEY_VARIABLE) or None


def access() -> Access:
    """What the environment asks for."""
    key = api_key()
    return Access(None if key is None else hashlib.sha256(key.encode()).hexdigest())


def is_loopback(host: str) -> bool:
    """Whether an address reaches this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Gatekeeper:
    """ASGI middleware that refuses with one JSON error.

    With a key, every path but ``/healthz`` needs it. Without one, clients of other machines are refused, whatever
    address Serve was told to listen on.
    """

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it here."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is None:
            body = _Body(receive)
            await self._app(scope, body.receive, send)
        else:
            await refusal(scope, receive, send)

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        headers = dict(scope["headers"])
        for name in REFUSED_HEADERS:
            if name in headers:
                return error(400, f"header {name.decode()} is not accepted; leave it out")
        announced = headers.get(b"content-length", b"0")
        if not announced.isdigit() or int(announced) > MOST_BODY_BYTES:
            return error(413, TOO_LARGE)
        if scope["path"] in OPEN_PATHS:
            return None
        if self._access.key_sha256 is None:
            host = (scope["client"] or ("an unknown address",))[0]
            if not is_loopback(host):
                message = (
                    f"requests from {host} need an API key, and none is set; set {KEY_VARIABLE} where Serve starts"
                )
                return error(403, message, kind="permission_error")
        elif not hmac.compare_digest(_presented_sha256(headers), self._access.key_sha256):
            return error(
                401,
                "expected the header 'Authorization: Bearer KEY' with this server's API key",
                kind="authentication_error",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return None


class _Body:
    """Counts a body that announced no length."""

    def __init__(self, receive: Receive) -> None:
        self._receive, self._read_bytes = receive, 0

    async def receive(self) -> Message:
        message = await self._receive()
        self._read_bytes += len(message.get("body", b""))
        if self._read_bytes > MOST_BODY_BYTES:
            raise HTTPException(413, TOO_LARGE)
        return message


def error(
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
    return hashlib.sha256(key.strip() if scheme.lower() == b"bearer" else b"").hexdigest()
