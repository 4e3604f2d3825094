"""Bodies of requests, which the event loop reads while everybody waits: what is in one is counted before anything is
made of it, and those that are long come in turn.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from overproof.serve.fair_queue import FairSemaphore
from overproof.serve.unicode_body import require_unicode_body

MAX_PARTS = 1 << 17  # texts, objects and lists of a body; numbers cost little, and are as many as its bytes hold
MAX_DEPTH = 100
LONG_BYTES = 64 << 10
CLIENT_CLOSED_REQUEST = 499  # as nginx has it; nobody reads the reply
NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
TEXT = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)


def fair_route() -> type[APIRoute]:
    """The class of an application's routes."""
    turns = FairSemaphore(1)

    class FairRoute(APIRoute):
        """Has a long body wait for its turn, and then for whatever else is ready."""

        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def handle_in_turn(request: Request) -> Response:
                try:
                    body = await request.body() if request.method == "POST" else b""
                except ClientDisconnect:
                    raise HTTPException(CLIENT_CLOSED_REQUEST, "the client went away") from None
                if len(body) > LONG_BYTES:
                    async with turns:
                        await asyncio.sleep(0)
                        _check(body)
                else:
                    _check(body)
                return await handle(request)  # which parses at once

            return handle_in_turn

    return FairRoute


def _check(body: bytes) -> None:
    require_little(body)
    require_unicode_body(body)


def require_little(body: bytes) -> None:
    """Look whether a body has more in it than any request needs.

    Raises:
        HTTPException: 413, it has.
    """
    if found := excess(body):
        raise HTTPException(413, f"the body has {found}")


def excess(body: bytes) -> str | None:
    """What there is too much of in JSON, if anything: a dictionary of 4 MB takes a second to make, and what is nested
    deep can be read and not be passed on.
    """
    opened = body.count(b"{") + body.count(b"[")
    if opened <= MAX_DEPTH and body.count(b'"') // 2 + opened <= MAX_PARTS:
        return None
    rest, texts = TEXT.subn(b"", body)  # in a text these are nothing but characters
    parts = texts + rest.count(b"{") + rest.count(b"[")
    if parts > MAX_PARTS:
        return f"{parts} texts, objects and lists in it; expected {MAX_PARTS} at most"
    depth = most = 0
    for bracket in rest.translate(None, NO_BRACKETS):
        depth += 1 if bracket in b"{[" else -1
        most = max(most, depth)
    return f"objects and lists in it {most} deep; expected {MAX_DEPTH} at most" if most > MAX_DEPTH else None
