"""What the gateway and the replicas say to each other: msgpack messages over one TCP connection for each replica.

A replica calls the gateway, whose address it has from the desk, through Ray; the secret that came with the address is
the first thing it says. A frame is its length in four bytes, big-endian, and the message. What is said within one turn
of the event loop is sent together: tokens of all streams that share an engine's step leave in one write.
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
from overproof.serve.async_engine import Generation, Prompt

ENCODER = msgspec.msgpack.Encoder()
LENGTH = 4
MOST_BYTES = 1 << 28
STRANGER_BYTES = 4096  # of what is not known yet
KEEP_ALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 10_000}  # s, s, -, ms


class GatewayAddress(msgspec.Struct, frozen=True):
    """Where a gateway takes calls of replicas."""

    host: str
    port: int
    secret: str


class GenerationWork(msgspec.Struct):
    prompt: Prompt
    sampling: Sampling


class Complete(GenerationWork, tag=True):
    pass


class Stream(GenerationWork, tag=True):
    pass


class Validate(GenerationWork, tag=True):
    pass


class ChatPrompt(msgspec.Struct, tag=True):
    messages: list[dict[str, str]]


class Detokenize(msgspec.Struct, tag=True):
    ids: Sequence[int]


class Check(msgspec.Struct, tag=True):
    pass


class Matrix(msgspec.Struct, tag=True, array_like=True):
    """A matrix of float32, row by row."""

    shape: tuple[int, int]
    data: bytes

    @classmethod
    def of(cls, matrix: NDArray[np.float32]) -> Matrix:
        rows, columns = matrix.shape
        return cls((rows, columns), matrix.astype("<f4", copy=False).tobytes())

    def numpy(self) -> NDArray[np.float32]:
        return np.frombuffer(self.data, "<f4").reshape(self.shape)


class Classify(msgspec.Struct, tag=True):
    pixels: Matrix


Work = Complete | Stream | Validate | ChatPrompt | Detokenize | Check | Classify
Value = Generation | Matrix | str | None


class Request(msgspec.Struct, tag=True):
    id: int
    work: Work


class Cancel(msgspec.Struct, tag=True):
    id: int


class Drained(msgspec.Struct, tag=True):
    """No more work comes, as was asked."""


class Hello(msgspec.Struct, tag=True):
    secret: str
    package: str
    room: int  # pieces of work it does at once


class Chunk(msgspec.Struct, tag=True):
    id: int
    piece: Piece


class Result(msgspec.Struct, tag=True):
    id: int
    value: Value = None


class Error(msgspec.Struct, tag=True):
    id: int
    message: str
    of_the_request: bool


class Drain(msgspec.Struct, tag=True):
    """Give me no more work."""


FromGateway = Request | Cancel | Drained
FromReplica = Hello | Chunk | Result | Error | Drain
RpcMessage = FromGateway | FromReplica


def encode_frame(message: RpcMessage) -> bytes:
    """A message as it is sent.

    Raises:
        InputError: it has a number or a text that cannot be.
    """
    try:
        encoded = ENCODER.encode(message)
    except (OverflowError, UnicodeEncodeError) as error:
        raise InputError(f"the request cannot be passed on: {error}; expected 64-bit numbers, valid Unicode") from None
    return len(encoded).to_bytes(LENGTH, "big") + encoded


class Connection(asyncio.Protocol):
    """One end of a connection: whole messages of one type, in their order."""

    def __init__(
        self,
        expected: Any,
        received: Callable[[Connection, Any], None],
        lost: Callable[[Connection], None],
        most_bytes: int = MOST_BYTES,
    ) -> None:
        self._decoder = msgspec.msgpack.Decoder(expected)
        self._received, self._lost, self.most_bytes = received, lost, most_bytes
        self._in, self._out = bytearray(), bytearray()
        self._transport: asyncio.Transport | None = None

    @property
    def open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def send(self, message: RpcMessage) -> None:
        """Say something; see ``send_frame``."""
        self.send_frame(encode_frame(message))

    def send_frame(self, framed: bytes) -> None:
        """Send a message together with all that is said this turn; where the connection is lost nobody hears it."""
        if self.open:
            if not self._out:
                asyncio.get_running_loop().call_soon(self._flush)
            self._out += framed

    def close(self) -> None:
        """End it when what was said is sent."""
        self._flush()
        if self._transport is not None:
            self._transport.close()

    def _flush(self) -> None:
        if self._out and self.open:
            assert self._transport is not None
            self._transport.write(bytes(self._out))
        self._out.clear()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        opened: socket.socket = transport.get_extra_info("socket")
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEP_ALIVE.items():  # a machine that is gone says no goodbye
            with contextlib.suppress(AttributeError):  # not every system has all
                opened.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def data_received(self, data: bytes) -> None:
        self._in += data
        at = 0
        while len(self._in) - at >= LENGTH:
            size = int.from_bytes(self._in[at : at + LENGTH], "big")
            if size > self.most_bytes:
                return self._refuse()
            if len(self._in) - at - LENGTH < size:
                break
            at += LENGTH + size
            try:
                message = self._decoder.decode(memoryview(self._in)[at - size : at])
            except msgspec.MsgspecError:
                return self._refuse()
            self._received(self, message)
            if not self.open:
                return None
        del self._in[:at]
        return None

    def connection_lost(self, _: Exception | None) -> None:
        self._lost(self)

    def _refuse(self) -> None:
        assert self._transport is not None
        self._transport.abort()
