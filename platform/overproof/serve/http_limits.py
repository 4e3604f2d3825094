"""HTTP/1.1 as uvicorn speaks it, with an end to headers: httptools takes any number of them, for any time."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MOST_HEADER_BYTES = 64 << 10
MOST_HEADER_SECONDS = 30


class LimitedHttpProtocol(HttpToolsProtocol):
    """Answers 431 or 408, and closes, where a request does not come to its body."""

    _late: asyncio.TimerHandle | None = None
    _read_bytes = 0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._have_headers()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._read_bytes += len(data)
        super().data_received(data)
        if self._late is not None and self._read_bytes > MOST_HEADER_BYTES:
            self._refuse("431 Request Header Fields Too Large", f"headers of more than {MOST_HEADER_BYTES} bytes")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._expect_headers()

    def on_headers_complete(self) -> None:
        self._have_headers()
        super().on_headers_complete()

    def _expect_headers(self) -> None:
        self._have_headers()
        self._read_bytes = 0
        message = f"no whole request in {MOST_HEADER_SECONDS} s"
        self._late = self.loop.call_later(MOST_HEADER_SECONDS, self._refuse, "408 Request Timeout", message)

    def _have_headers(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _refuse(self, status: str, message: str) -> None:
        self._have_headers()
        if not self.transport.is_closing():
            body = f'{{"error":{{"message":"{message}","type":"invalid_request_error","param":null}}}}'
            head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            self.transport.write(f"{head}connection: close\r\n\r\n{body}".encode())
            self.transport.close()
