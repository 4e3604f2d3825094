"""Clients of one server, in a process of their own and with the standard library alone: they cost little of the cores.

    python clients.py URL < PLAN

PLAN is JSON: ``method``, ``path``, ``bodies`` (each asked once, null for none), ``clients`` (each keeps one connection
open and takes the next body when it is through) and ``stream``. Prints JSON: ``wall_s``, ``cpu_s`` of this process,
``tokens`` by the replies' own usage, and the seconds of every request up to its first text (``first_s``) and to its end
(``whole_s``). Any reply but 200, and any error in a stream, ends it.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

COMPLETION_TOKENS = re.compile(rb'"completion_tokens":\s*(\d+)')
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Connection:
    """HTTP/1.1 that stays open, and opens again where the server closed it between two requests."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._streams: Streams | None = None

    async def ask(self, method: str, path: str, body: bytes) -> AsyncIterator[bytes]:
        """The reply's body, a block at a time."""
        head = f"{method} {path} HTTP/1.1\r\nHost: {self._host}\r\nContent-Length: {len(body)}\r\n"
        request = f"{head}Content-Type: application/json\r\n\r\n".encode() + body
        used = self._streams is not None
        reader, status = await self._send(request)
        if not status and used:
            self.close()
            reader, status = await self._send(request)
        headers = {}
        while (line := await reader.readline()) not in (b"\r\n", b""):
            name, _, value = line.decode().partition(":")
            headers[name.lower()] = value.strip().lower()
        if b" 200 " not in status:
            raise SystemExit(f"{path}: {status!r} {await reader.read(500)!r}")
        if headers.get("transfer-encoding") == "chunked":
            while size := int(await reader.readline(), 16):
                yield (await reader.readexactly(size + 2))[:-2]
            await reader.readline()
        else:
            yield await reader.readexactly(int(headers["content-length"]))
        if headers.get("connection") == "close":
            self.close()

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None

    async def _send(self, request: bytes) -> tuple[asyncio.StreamReader, bytes]:
        if self._streams is None:
            self._streams = await asyncio.open_connection(self._host, self._port)
        reader, writer = self._streams
        try:
            writer.write(request)
            return reader, await reader.readline()
        except ConnectionError:
            return reader, b""


async def events(blocks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The data of each server-sent event."""
    held = b""
    async for block in blocks:
        *whole, held = (held + block).split(b"\n\n")
        for event in whole:
            if event.startswith(b"data:"):
                yield event[5:].strip()


def has_text(event: bytes) -> bool:
    """Whether a completion's or a chat's event shows anything."""
    found = json.loads(event)
    if "error" in found:
        raise SystemExit(f"an error in the stream: {found}")
    choice = (found["choices"] or [{}])[0]
    return bool(choice.get("text") or choice.get("delta", {}).get("content"))


async def streamed(blocks: AsyncIterator[bytes], began_s: float) -> tuple[float, int]:
    """Seconds to the first text, and the tokens that the server counted."""
    first_s, tokens = 0.0, 0
    async for event in events(blocks):
        if event.startswith(b'{"error"'):
            raise SystemExit(f"an error in the stream: {event!r}")
        if not first_s and event != b"[DONE]" and has_text(event):
            first_s = time.perf_counter() - began_s
        if found := COMPLETION_TOKENS.search(event):
            tokens = int(found[1])
    if not first_s or not tokens:
        raise SystemExit(f"a stream with {tokens} tokens and its first text after {first_s} s")
    return first_s, tokens


async def run(url: str, plan: dict[str, Any]) -> dict[str, Any]:
    at = urlsplit(url)
    assert at.hostname is not None
    assert at.port is not None
    bodies = iter([b"" if body is None else json.dumps(body).encode() for body in plan["bodies"]])
    found: dict[str, Any] = {"tokens": 0, "first_s": [], "whole_s": []}

    async def client(host: str, port: int) -> None:
        connection = Connection(host, port)
        for body in bodies:
            began_s = time.perf_counter()
            blocks = connection.ask(plan["method"], plan["path"], body)
            if plan["stream"]:
                first_s, tokens = await streamed(blocks, began_s)
                found["first_s"].append(first_s)
                found["tokens"] += tokens
            else:
                async for _ in blocks:
                    pass
            found["whole_s"].append(time.perf_counter() - began_s)
        connection.close()

    began_s, cpu_s = time.perf_counter(), time.process_time()
    await asyncio.gather(*(client(at.hostname, at.port) for _ in range(plan["clients"])))
    return {"wall_s": time.perf_counter() - began_s, "cpu_s": time.process_time() - cpu_s, **found}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(run(sys.argv[1], json.load(sys.stdin)))))
