"""Connections over TLS, counted and under a deadline from the moment that they are accepted.

An event loop tells a protocol of a connection when its handshake is over. Until then nobody would count it, and a
client that never sends its part would keep a file of the process open for a minute, as often as it likes.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Coroutine
from typing import Any

import uvicorn

from overproof.serve.http_limits import LimitedHttpProtocol, admit, release

HANDSHAKE_TIMEOUT_S = 10.0
RETRY_S = 0.5  # after the process could open no more files


class TlsServer(uvicorn.Server):
    """uvicorn's server, which accepts and shakes hands by itself. A connection too many is closed: before the handshake
    nothing can be said.
    """

    def __init__(self, config: uvicorn.Config, context: ssl.SSLContext) -> None:
        super().__init__(config)
        self._context = context
        self._tasks: set[asyncio.Task[None]] = set()  # that accept, and handshakes under way

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=[])
        for listening in sockets or ():
            self._start(self._accept(listening))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for listening in sockets or ():
            listening.close()
        await super().shutdown(sockets=[])

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, (address, *_) = await loop.sock_accept(listening)
            except OSError:
                await asyncio.sleep(RETRY_S)
                continue
            connection.setblocking(False)
            if admit(address):
                self._start(self._shake_hands(connection, address))
            else:
                connection.close()

    async def _shake_hands(self, connection: socket.socket, address: str) -> None:
        http = LimitedHttpProtocol(self.config, self.server_state, self.lifespan.state)
        http.admitted = address
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: http, connection, ssl=self._context, ssl_handshake_timeout=HANDSHAKE_TIMEOUT_S
            )
        except OSError:  # an ssl.SSLError and a timeout are
            connection.close()
        finally:
            if not http.is_connected:
                release(address)
