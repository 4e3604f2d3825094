"""One line of JSON for every request: who asked what, when, and how it ended.

Lines are written together, a few times a second: one by one they would cost a tenth of a small request.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from datetime import UTC, datetime
from typing import Any

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from overproof.serve.middleware import KEY_IN_SCOPE

LOG = logging.getLogger("ray.serve")  # whose lines Ray Serve writes into the replica's own file
KEPT_BYTES = 1 << 16  # of a body, where it is written at all
FLUSH_S = 0.1


class AccessLog:
    """ASGI middleware; every reply carries ``x-request-id``. Bodies are written only ``with_bodies``."""

    def __init__(self, app: ASGIApp, with_bodies: bool = False) -> None:
        self._app, self._with_bodies = app, with_bodies
        self._lines: list[bytes] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and write how it ended."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began_s, request = time.perf_counter(), secrets.token_hex(16)
        said: dict[str, Any] = {"at": datetime.now(UTC), "request": request, "status": 499}
        said |= {"method": scope["method"], "path": scope["path"]}
        bodies = {"body": b"", "reply": b""}

        async def received() -> Message:
            message = await receive()
            if self._with_bodies and len(bodies["body"]) < KEPT_BYTES:
                bodies["body"] += message.get("body", b"")
            return message

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                said["status"] = message["status"]
                message = {**message, "headers": [*message.get("headers", []), (b"x-request-id", request.encode())]}
            elif self._with_bodies and len(bodies["reply"]) < KEPT_BYTES:
                bodies["reply"] += message.get("body", b"")
            await send(message)

        try:
            await self._app(scope, received, sent)
        finally:
            key = scope.get(KEY_IN_SCOPE)
            said |= {
                "seconds": round(time.perf_counter() - began_s, 6),
                "client": (scope["client"] or ("",))[0],
                "key": None if key is None else key.name,
            }
            if self._with_bodies:
                said |= {name: body[:KEPT_BYTES].decode(errors="replace") for name, body in bodies.items()}
            self._write(msgspec.json.encode(said))

    def _write(self, line: bytes) -> None:
        if not self._lines:
            asyncio.get_running_loop().call_later(FLUSH_S, self.flush)
        self._lines.append(line)

    def flush(self) -> None:
        """Write what is not written yet."""
        if self._lines:
            LOG.info("access\n%s", b"\n".join(self._lines).decode())
            self._lines.clear()
