"""Deadlines for every state of a connection, and limits on their number, which uvicorn's protocol does not have.

A connection waits for headers, for a body, for its client to read, or for the next request (uvicorn's own
`timeout_keep_alive`); what the application does has its own limit. Whatever state it is in, it comes to an end.
"""

from __future__ import annotations

import asyncio
import resource
from collections import Counter
from typing import Any, NoReturn

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEADER_BYTES = 64 << 10
MAX_HEADERS = 1000
MAX_PIPELINED = 100  # requests that a client sends ahead of their replies
MAX_PARTS = 8192  # that a body comes in: each takes about as long, a byte or the most that there may be
HEADER_TIMEOUT_S = 30.0
BODY_TIMEOUT_S = 35.0  # after the application's own, whose answer says more
READ_TIMEOUT_S = 30.0  # for a client to take what it is sent
LINGER_S = 10.0  # for what a connection that is being closed still has to send
TOO_LARGE = "431 Request Header Fields Too Large"
MAX_CONNECTIONS = 4096  # or half the files that the process may open
MAX_PER_ADDRESS = 1024  # a proxy is one address
OPEN: Counter[str] = Counter()  # connections of this process by address


class LimitedHttpProtocol(HttpToolsProtocol):
    """Answers 408, 431 or 503 and closes the connection where the client is too slow, too long or one too many."""

    admitted: str | None = None  # the address that it counts for
    is_connected = False  # or was
    _deadline: asyncio.TimerHandle | None = None  # of what the client sends
    _reading: asyncio.TimerHandle | None = None  # of what it takes
    _linger: asyncio.TimerHandle | None = None
    _header_bytes = 0  # that came, of a head that is not complete
    _headers_bytes = 0  # of the headers in it that are
    _parts = 0  # of a body
    _in_headers = False
    _over = ""  # the limit that what comes is over

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.ws_protocol_class = None  # an upgraded connection would leave this protocol, and stay counted
        self.is_connected = True
        if self.admitted is None:
            address = self.client[0] if self.client else ""
            if not admit(address):
                self._refuse("503 Service Unavailable", "too many connections; try again later, over fewer")
                return
            self.admitted = address
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._deadline, self._reading, self._linger):
            if timer is not None:
                timer.cancel()
        if self.admitted is not None:
            release(self.admitted)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        was_in_headers = self._in_headers
        super().data_received(data)
        self._header_bytes = self._header_bytes + len(data) if was_in_headers and self._in_headers else 0
        if self._header_bytes > MAX_HEADER_BYTES:
            self._refuse(TOO_LARGE, f"headers of more than {MAX_HEADER_BYTES} bytes")
        elif self._deadline is None and (self.cycle is None or self.cycle.response_complete):
            self._await_headers()  # what came was no request, and has ended the wait for the next one

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= MAX_PIPELINED:
            self._end_parsing(f"more than {MAX_PIPELINED} requests at once")
        super().on_message_begin()
        self._headers_bytes = self._parts = 0
        self._await_headers()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers_bytes += len(name) + len(value)
        if self._headers_bytes > MAX_HEADER_BYTES or len(self.headers) >= MAX_HEADERS:
            self._end_parsing(f"more than {MAX_HEADERS} headers, or than {MAX_HEADER_BYTES} bytes of them")
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_headers = False
        self._await("body", BODY_TIMEOUT_S)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            self._end_parsing(f"a body in more than {MAX_PARTS} parts")
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._cancel_deadline()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._close_in_time()

    def send_400_response(self, msg: str) -> None:
        if self._over:
            self._refuse(TOO_LARGE, self._over)
            return
        super().send_400_response(msg)
        self._close_in_time()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._reading is None:
            self._reading = self.loop.call_later(READ_TIMEOUT_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def _end_parsing(self, over: str) -> NoReturn:
        """The parser ends at an error of a callback, with whatever else has come."""
        self._over = over
        raise ValueError(over)

    def _await_headers(self) -> None:
        self._in_headers = True
        self._await("headers", HEADER_TIMEOUT_S)

    def _await(self, part: str, seconds: float) -> None:
        self._cancel_deadline()
        message = f"the {part} did not come in {seconds:g} s"
        self._deadline = self.loop.call_later(seconds, self._refuse, "408 Request Timeout", message)

    def _cancel_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _refuse(self, status: str, message: str) -> None:
        self._cancel_deadline()
        if self.transport.is_closing():
            return
        if self.cycle is None or (self.cycle.response_complete and self._in_headers):  # no reply is on its way
            body = f'{{"error":{{"message":"{message}","type":"invalid_request_error","param":null}}}}'
            head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            self.transport.write(f"{head}connection: close\r\n\r\n{body}".encode())
        self.transport.close()
        self._close_in_time()

    def _close_in_time(self) -> None:
        """A connection that is being closed waits for its client to read the rest, for ever."""
        if self.transport.is_closing() and self._linger is None:
            self._linger = self.loop.call_later(LINGER_S, self.transport.abort)


def admit(address: str) -> bool:
    """Count a connection from there; False where it is one too many."""
    if OPEN.total() >= most_connections() or OPEN[address] >= MAX_PER_ADDRESS:
        return False
    OPEN[address] += 1
    return True


def release(address: str) -> None:
    """One that was admitted is no more."""
    OPEN[address] -= 1
    if not OPEN[address]:
        del OPEN[address]


def most_connections() -> int:
    """Connections that this process takes."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_CONNECTIONS if files == resource.RLIM_INFINITY else min(MAX_CONNECTIONS, files // 2)
