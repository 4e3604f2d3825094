"""Limits on the size and the time of HTTP headers, which uvicorn's httptools protocol does not have."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEADER_BYTES = 64 << 10
HEADER_TIMEOUT_S = 30


class LimitedHttpProtocol(HttpToolsProtocol):
    """Answers 431 or 408 and closes the connection where the headers are too large or too slow."""

    _timer: asyncio.TimerHandle | None = None
    _read_bytes = 0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._read_bytes += len(data)
        super().data_received(data)
        if self._timer is not None and self._read_bytes > MAX_HEADER_BYTES:
            self._refuse("431 Request Header Fields Too Large", f"headers of more than {MAX_HEADER_BYTES} bytes")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._start_timer()

    def on_headers_complete(self) -> None:
        self._cancel_timer()
        super().on_headers_complete()

    def _start_timer(self) -> None:
        self._cancel_timer()
        self._read_bytes = 0
        message = f"the headers did not come in {HEADER_TIMEOUT_S} s"
        self._timer = self.loop.call_later(HEADER_TIMEOUT_S, self._refuse, "408 Request Timeout", message)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self, status: str, message: str) -> None:
        self._cancel_timer()
        if not self.transport.is_closing():
            body = f'{{"error":{{"message":"{message}","type":"invalid_request_error","param":null}}}}'
            head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            self.transport.write(f"{head}connection: close\r\n\r\n{body}".encode())
            self.transport.close()
