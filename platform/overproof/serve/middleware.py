"""ASGI middleware that decides who may ask and how much, before a request reaches an engine."""

from __future__ import annotations

import asyncio
import hmac
import logging
import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from overproof.addresses import is_loopback
from overproof.errors import InputError
from overproof.files import absolute_uri
from overproof.serve.api_keys import ApiKey, KeyStore, KeysUnavailable, RateLimiter, hash_key, read_keys
from overproof.serve.async_engine import Work
from overproof.serve.environment import KEY_VARIABLE, KEYS_VARIABLE, api_key, keys_uri
from overproof.serve.fair_queue import CLIENT
from overproof.serve.request_source import ANY_ORIGIN, OPEN_PATHS, SourcePolicy, SourceRefused
from overproof.serve.responses import SERVER_ERROR, ErrorDetail, ErrorReply
from overproof.serve.traffic import Recorder

LOG = logging.getLogger("overproof.serve")
MAX_BODY_BYTES = 4 << 20
MAX_HELD_BYTES = 16 * MAX_BODY_BYTES  # of the bodies of one client's requests in progress
BODY_TIMEOUT_S = 30
REQUEST_TIMEOUT_S = 300
BODY_TOO_LARGE = f"the body is larger than {MAX_BODY_BYTES} bytes; send less at a time"
KEY_IN_SCOPE = "overproof.key"  # of an ASGI request: the key that it carries
OWN_KEY = ApiKey(name=KEY_VARIABLE, sha256="", created="", operator=True)  # as the log names it; it has no limits
OPERATOR_PATHS = ("/metrics",)  # of all keys' requests; they count against no limit
DOCS_PATHS = ("/docs", "/openapi.json", "/static-offline-docs/")  # no secret, and a browser sends no key for them
EXPOSED_HEADERS = ("x-request-id", "retry-after")  # to pages of other origins
# By these Ray Serve would let a client lift its time limit and outlive its disconnection.
REFUSED_HEADERS = (b"x-request-timeout-seconds", b"x-request-disconnect-disabled")


@dataclass(frozen=True)
class Access:
    """The keys that requests may carry: one by its hash (the key itself stays where it was set), or those of a file."""

    key_sha256: str | None = None
    keys_uri: str | None = None

    @property
    def needs_key(self) -> bool:
        return not (self.key_sha256 is None and self.keys_uri is None)


def load_access() -> Access:
    """What the environment asks for.

    Raises:
        InputError: a file of keys cannot be read, or holds none.
    """
    key, uri = api_key(), keys_uri()
    if uri is not None:
        uri = absolute_uri(uri)
        if not read_keys(uri).keys:
            raise InputError(f"{KEYS_VARIABLE}: {uri} is not there, or holds no key; `overproof keys add` makes one")
    return Access(None if key is None else hash_key(key), uri)


class Telemetry:
    """What a server counts beside its answers: limits of keys, and recorded traffic. The gateway adds metrics."""

    def __init__(self, limiter: RateLimiter | None = None, recorder: Recorder | None = None) -> None:
        self._limiter, self.recorder = limiter or RateLimiter(), recorder

    def admit(self, key: ApiKey) -> float:
        """0 where a request with this key may pass, else the seconds to wait."""
        return self._limiter.admit(key)

    def on_work(self, package: str, key: ApiKey | None, work: Work) -> None:  # noqa: ARG002
        """Called when an engine has ended a request, or a choice of one, however: with the tokens that it read and
        generated.
        """
        if key is not None:
            self._limiter.charge(key, work.tokens)

    def on_first_event(self, package: str, seconds: float) -> None:
        """Called when a stream sends its first event, with the seconds since the request."""

    async def metrics(self) -> str:
        """Metrics in Prometheus' text format."""
        return ""

    def close(self) -> None:
        """Called when serving ends."""
        if self.recorder is not None:
            self.recorder.close()


class SourceMiddleware:
    """Refuses what comes from where nobody may ask, and tells the application the client's address. Pages of configured
    origins get what browsers want to hear (CORS), errors included; no other does.
    """

    def __init__(self, app: ASGIApp, policy: SourcePolicy, needs_key: bool) -> None:
        self._policy, self._needs_key, self._app = policy, needs_key, app
        if policy.origins:
            # A key is no credential that a browser adds by itself, so none is allowed for.
            self._app = CORSMiddleware(
                app,
                allow_origins=policy.origins,
                allow_methods=("GET", "HEAD", "POST"),
                allow_headers=(ANY_ORIGIN,),
                expose_headers=EXPOSED_HEADERS,
                allow_private_network=True,
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._policy.check(scope, self._needs_key)
                client = self._policy.client(scope)
            except SourceRefused as refused:
                kind = "permission_error" if refused.status == 403 else "invalid_request_error"
                await error_response(refused.status, str(refused), kind)(scope, receive, send)
                return
            if client is None or client != scope["client"][0]:
                scope["client"] = None if client is None else (client, 0)
        await self._app(scope, receive, send)


class AuthMiddleware:
    """Passes a request on, or answers it with one JSON error.

    With a key, every path but ``/healthz``, ``/readyz`` and the docs needs it. Without one, clients of other machines
    are refused, whatever address Serve was told to listen on.
    """

    def __init__(self, app: ASGIApp, access: Access, telemetry: Telemetry) -> None:
        self._app, self._access, self._telemetry = app, access, telemetry
        self._keys = None if access.keys_uri is None else KeyStore(access.keys_uri)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="keys")  # no request's work is before a key's
        self._held_bytes = Counter[str]()  # of bodies, by client

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        error = self._check_headers(scope) or await self._authorize(scope)
        if error is None:
            with _LimitedBody(receive, self._held_bytes) as body:
                await self._forward(scope, body, send)
        else:
            await error(scope, receive, send)

    def _check_headers(self, scope: Scope) -> JSONResponse | None:
        headers = dict(scope["headers"])
        for name in REFUSED_HEADERS:
            if name in headers:
                return error_response(400, f"header {name.decode()} is not accepted; leave it out")
        content_length = headers.get(b"content-length", b"0")
        if not content_length.isdigit() or int(content_length) > MAX_BODY_BYTES:
            return error_response(413, BODY_TOO_LARGE)
        return None

    async def _authorize(self, scope: Scope) -> JSONResponse | None:
        """The refusal of a request; None where it may pass, with its key in the scope where that has limits."""
        host = (scope["client"] or ("an unknown address",))[0]
        CLIENT.set(f"address {host}")
        if scope["path"] in OPEN_PATHS:
            return None
        if not self._access.needs_key:
            if is_loopback(host):
                return None
            message = f"requests from {host} need an API key, and none is set; set {KEY_VARIABLE} where Serve starts"
            return error_response(403, message, kind="permission_error")
        if scope["path"].startswith(DOCS_PATHS):
            return None
        presented = _presented_sha256(dict(scope["headers"]))
        if hmac.compare_digest(presented, self._access.key_sha256 or ""):
            scope[KEY_IN_SCOPE] = OWN_KEY
            return None
        try:
            key = await self._find_key(presented)
        except KeysUnavailable:
            message = "the file of keys cannot be read; the server's log says why"
            return error_response(503, message, kind="server_error", headers={"Retry-After": "2"})
        if key is None:
            found = "the API key is none of this server's" if presented != NO_KEY else "no API key was sent"
            return error_response(
                401,
                f"{found}; expected the header 'Authorization: Bearer KEY' with a key of this server",
                kind="authentication_error",
                headers={"WWW-Authenticate": "Bearer"},
            )
        scope[KEY_IN_SCOPE] = key
        CLIENT.set(f"key {key.name}")
        if scope["path"] in OPERATOR_PATHS:
            if key.operator:
                return None
            message = f"key {key.name!r} is no operator's; make one: `overproof keys add NAME --operator`"
            return error_response(403, message, kind="permission_error")
        if key.limits:
            wait_s = self._telemetry.admit(key)
            if wait_s > 0:
                return error_response(
                    429,
                    f"key {key.name!r} has used up its limit of a minute; ask again in {wait_s:.0f} s",
                    kind="rate_limit_error",
                    headers={"Retry-After": str(math.ceil(wait_s))},
                )
        return None

    async def _find_key(self, presented: str) -> ApiKey | None:
        if self._keys is None:
            return None
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._keys.find, presented)

    async def _forward(self, scope: Scope, body: _LimitedBody, send: Send) -> None:
        started = False

        async def send_and_note_start(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                await self._app(scope, body.receive, send_and_note_start)
        except TimeoutError:
            message = f"not done in {REQUEST_TIMEOUT_S} s; ask for less at a time"
            error = error_response(408, message, "timeout_error")
            if started:  # a stream, whose last event is the error
                await send({"type": "http.response.body", "body": b"data: " + bytes(error.body) + b"\n\n"})
            else:
                await error(scope, body.receive, send)
        except Exception:
            if started:
                raise
            LOG.exception("a request failed")
            await error_response(500, SERVER_ERROR, kind="server_error")(scope, body.receive, send)


class _LimitedBody:
    """Ends a body that is too large without having said so, or too slow, or for which its client holds too much."""

    def __init__(self, receive: Receive, held_bytes: Counter[str]) -> None:
        self._receive, self._read_bytes, self._complete = receive, 0, False
        self._held_bytes, self._client = held_bytes, CLIENT.get()
        self._deadline_s = asyncio.get_running_loop().time() + BODY_TIMEOUT_S

    def __enter__(self) -> _LimitedBody:
        return self

    def __exit__(self, *_: object) -> None:
        self._held_bytes[self._client] -= self._read_bytes
        if not self._held_bytes[self._client]:
            del self._held_bytes[self._client]

    async def receive(self) -> Message:
        try:
            async with asyncio.timeout_at(None if self._complete else self._deadline_s):
                message = await self._receive()
        except TimeoutError:
            raise HTTPException(408, f"the body did not come in {BODY_TIMEOUT_S} s") from None
        self._complete = not message.get("more_body", False)
        read_bytes = len(message.get("body", b""))
        self._read_bytes += read_bytes
        self._held_bytes[self._client] += read_bytes
        if self._read_bytes > MAX_BODY_BYTES:
            raise HTTPException(413, BODY_TOO_LARGE)
        if read_bytes and self._held_bytes[self._client] > MAX_HELD_BYTES:
            detail = f"your requests in progress have bodies of more than {MAX_HELD_BYTES} bytes; ask again later"
            raise HTTPException(429, detail, {"Retry-After": "1"})
        return message


def error_response(
    status: int,
    message: str,
    kind: str = "invalid_request_error",
    param: str | None = None,
    headers: dict[str, str] | None = None,
    code: str | None = None,
) -> JSONResponse:
    """An error as OpenAI's API writes it."""
    error = ErrorDetail(message=message, type=kind, param=param, code=code)
    content: dict[str, Any] = ErrorReply(error=error).model_dump()
    return JSONResponse(content, status, headers)


NO_KEY = hash_key("")


def _presented_sha256(headers: dict[bytes, bytes]) -> str:
    scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
    return hash_key(key.strip().decode("latin-1") if scheme.lower() == b"bearer" else "")
