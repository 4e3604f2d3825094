"""The protocol between the gateway and the replicas: msgpack messages over one TCP connection for each replica.

A replica connects to the gateway, whose address it has from the controller, through Ray; the secret that came with the
address is the first thing it sends. A frame is its length in four bytes, big-endian, and the message. Messages of one
turn of the event loop are sent together: tokens of all streams that share an engine's step leave in one write.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Sequence
from typing import Any, cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from overproof.engines.base import Piece, Sampling
from overproof.errors import InputError
from overproof.serve.async_engine import Generation, Prompt, Work

ENCODER = msgspec.msgpack.Encoder()
LENGTH_BYTES = 4
MAX_FRAME_BYTES = 1 << 28
MAX_HELLO_BYTES = 4096  # of a connection that is not authenticated
TCP_KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 10_000}  # s, s, -, ms


class GatewayAddress(msgspec.Struct, frozen=True):
    """Where a gateway takes connections of replicas."""

    host: str
    port: int
    secret: str


class GenerationOperation(msgspec.Struct):
    prompt: Prompt
    sampling: Sampling


class Complete(GenerationOperation, tag=True):
    pass


class Stream(GenerationOperation, tag=True):
    pass


class Validate(GenerationOperation, tag=True):
    pass


class ChatPrompt(msgspec.Struct, tag=True):
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]


class DescribeCalls(msgspec.Struct, tag=True):
    pass


class CallSyntax(msgspec.Struct, tag=True, array_like=True):
    """The fields of a ``ToolSyntax``."""

    before_name: str
    before_arguments: str
    after: str


class Detokenize(msgspec.Struct, tag=True):
    ids: Sequence[int]


class Check(msgspec.Struct, tag=True):
    pass


class Matrix(msgspec.Struct, tag=True, array_like=True):
    """A matrix of float32, row by row."""

    shape: tuple[int, int]
    data: bytes

    @classmethod
    def from_numpy(cls, matrix: NDArray[np.float32]) -> Matrix:
        rows, columns = matrix.shape
        return cls((rows, columns), matrix.astype("<f4", copy=False).tobytes())

    def to_numpy(self) -> NDArray[np.float32]:
        return np.frombuffer(self.data, "<f4").reshape(self.shape)


class Logprobs(msgspec.Struct, tag=True):
    inputs: Matrix


Operation = (  # of an ``AsyncEngine``
    Complete | Stream | Validate | ChatPrompt | DescribeCalls | Detokenize | Check | Logprobs
)
GENERATING = (Complete, Stream, Logprobs)  # operations that take a slot; the others cost little
SMALL_AT_ONCE = 2  # of the others, that a replica works at at once
ResultValue = Generation | Matrix | CallSyntax | str | None


class Request(msgspec.Struct, tag=True):
    """Answered by chunks of a stream, and one result or error."""

    id: int
    operation: Operation


class Cancel(msgspec.Struct, tag=True):
    """Nobody waits for this request any more; the replica answers with an error when it has ended."""

    id: int


class Drained(msgspec.Struct, tag=True):
    """Answer to ``Drain``: no more requests come."""


class Hello(msgspec.Struct, tag=True):
    """A replica's first message."""

    secret: str
    package: str
    capacity: int  # requests that it takes at once


class Chunk(msgspec.Struct, tag=True):
    id: int
    piece: Piece


class Result(msgspec.Struct, tag=True):
    id: int
    value: ResultValue = None
    work: Work | None = None  # of a generation


class Error(msgspec.Struct, tag=True):
    id: int
    message: str
    is_request_error: bool  # else the server is to blame
    code: str | None = None  # see ``InputError``
    work: Work | None = None


class Drain(msgspec.Struct, tag=True):
    """The replica stops: send it no more requests."""


FromGateway = Request | Cancel | Drained
FromReplica = Hello | Chunk | Result | Error | Drain
RpcMessage = FromGateway | FromReplica


def encode_frame(message: RpcMessage) -> bytes:
    """A message as it is sent.

    Raises:
        InputError: it holds a number or a text that msgpack cannot encode.
    """
    try:
        encoded = ENCODER.encode(message)
    except (OverflowError, UnicodeEncodeError) as error:
        raise InputError(f"the request cannot be passed on: {error}; expected 64-bit numbers, valid Unicode") from None
    return len(encoded).to_bytes(LENGTH_BYTES, "big") + encoded


class Connection(asyncio.Protocol):
    """One end of a connection. ``on_message`` gets messages of the expected type, whole and in their order; a peer that
    sends anything else is disconnected.
    """

    def __init__(
        self,
        expected: Any,
        on_message: Callable[[Connection, Any], None],
        on_close: Callable[[Connection], None],
        max_frame_bytes: int = MAX_FRAME_BYTES,
    ) -> None:
        self._decoder = msgspec.msgpack.Decoder(expected)
        self._on_message, self._on_close, self.max_frame_bytes = on_message, on_close, max_frame_bytes
        self._read_buffer, self._write_buffer = bytearray(), bytearray()
        self._transport: asyncio.Transport | None = None

    @property
    def open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def send(self, message: RpcMessage) -> None:
        """Encode and send a message; see ``send_frame``."""
        self.send_frame(encode_frame(message))

    def send_frame(self, frame: bytes) -> None:
        """Send a frame with all others of this turn of the loop; where the connection is lost it is dropped."""
        if self.open:
            if not self._write_buffer:
                asyncio.get_running_loop().call_soon(self._flush)
            self._write_buffer += frame

    def close(self) -> None:
        """Close the connection once everything is sent."""
        self._flush()
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        sock: socket.socket = transport.get_extra_info("socket")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in TCP_KEEPALIVE.items():  # for a machine that is gone sends nothing, not even an end
            with contextlib.suppress(AttributeError):  # not every system has all
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def data_received(self, data: bytes) -> None:
        self._read_buffer += data
        end = 0  # of the frames that are decoded
        while len(self._read_buffer) - end >= LENGTH_BYTES:
            size = int.from_bytes(self._read_buffer[end : end + LENGTH_BYTES], "big")
            if size > self.max_frame_bytes:
                return self._abort()
            if len(self._read_buffer) - end - LENGTH_BYTES < size:
                break
            end += LENGTH_BYTES + size
            try:
                message = self._decoder.decode(memoryview(self._read_buffer)[end - size : end])
            except msgspec.MsgspecError:
                return self._abort()
            self._on_message(self, message)
            if not self.open:
                return None
        del self._read_buffer[:end]
        return None

    def connection_lost(self, _: Exception | None) -> None:
        self._on_close(self)

    def _flush(self) -> None:
        if self._write_buffer and self.open:
            assert self._transport is not None
            self._transport.write(bytes(self._write_buffer))
        self._write_buffer.clear()

    def _abort(self) -> None:
        assert self._transport is not None
        self._transport.abort()
