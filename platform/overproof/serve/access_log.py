"""One line of JSON for every request: who asked what, when, and how it ended."""

from __future__ import annotations

import json
import logging
import time
import uuid
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from overproof.serve.limits import KEY_IN_SCOPE

LOG = logging.getLogger("ray.serve")  # whose lines Ray Serve writes into the replica's own file
KEPT_BYTES = 1 << 16  # of a body, where it is written at all


class AccessLog:
    """ASGI middleware; every reply carries ``x-request-id``. Bodies are written only ``with_bodies``."""

    def __init__(self, app: ASGIApp, with_bodies: bool = False) -> None:
        self._app, self._with_bodies = app, with_bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and write how it ended."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began_s, request = time.perf_counter(), uuid.uuid4().hex
        said: dict[str, Any] = {"request": request, "method": scope["method"], "path": scope["path"], "status": 499}
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
            LOG.info("access %s", json.dumps(said))
