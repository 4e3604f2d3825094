"""The replicas as the gateway has them: who is there, who has room, and who waits for it."""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from overproof.engines.base import Piece, Sampling
from overproof.errors import InputError
from overproof.serve import rpc
from overproof.serve.async_engine import Busy, Generation, Prompt

TRIES = 4  # of a request that no part of an answer was sent of, when its replica dies
STRANGER_S = 5.0  # a connection that has not said who it is
IDS = count()


class ReplicaDied(Exception):
    """A replica died."""


Arrived = asyncio.Queue[rpc.Chunk | rpc.Result | rpc.Error | None]  # None, the replica is gone


@dataclass(eq=False)
class ReplicaConnection:
    """A replica that has called."""

    link: rpc.Connection
    room: int
    taken: int = 0
    leaving: bool = False
    doing: dict[int, tuple[Arrived, bool]] = field(default_factory=dict)  # and whether it takes room

    @property
    def free(self) -> bool:
        return not self.leaving and self.taken < self.room


@dataclass(frozen=True)
class ReplicaLoad:
    """What a package's replicas have to do."""

    replicas: int
    running: int
    waiting: int

    @property
    def requests(self) -> int:
        return self.running + self.waiting


class ReplicaPool:
    """The ``Backend`` that all replicas of a package are together: the one with the least to do takes the next
    request, and where none has room requests wait in their order, ``most_waiting`` of them.
    """

    def __init__(self) -> None:
        self.most_waiting = 0
        self._members: list[ReplicaConnection] = []
        self._waiting: deque[asyncio.Future[ReplicaConnection]] = deque()
        self._somebody = asyncio.Event()
        self._hoping = 0  # those that take no room and wait for any replica

    @property
    def load(self) -> ReplicaLoad:
        waiting = sum(not each.done() for each in self._waiting) + self._hoping
        return ReplicaLoad(sum(not m.leaving for m in self._members), sum(m.taken for m in self._members), waiting)

    async def complete(self, prompt: Prompt, sampling: Sampling) -> Generation:
        done: Generation = await self._one(rpc.Complete(prompt, sampling))
        return done

    async def accept(self, prompt: Prompt, sampling: Sampling) -> None:
        await self._one(rpc.Validate(prompt, sampling), takes_room=False)

    async def stream(self, prompt: Prompt, sampling: Sampling) -> AsyncGenerator[Piece]:
        for attempt in range(TRIES):
            begun = False
            try:
                async with self._asked(rpc.Stream(prompt, sampling), takes_room=True) as arrived:
                    while isinstance(came := _sound(await arrived.get()), rpc.Chunk):
                        begun = True
                        yield came.piece
                return
            except ReplicaDied:
                if begun or attempt == TRIES - 1:
                    raise

    async def chat_prompt(self, messages: Sequence[Mapping[str, str]]) -> str:
        prompt: str = await self._one(rpc.ChatPrompt([dict(message) for message in messages]), takes_room=False)
        return prompt

    async def detokenize(self, ids: Sequence[int]) -> str:
        text: str = await self._one(rpc.Detokenize(ids), takes_room=False)
        return text

    async def classify(self, pixels_BD: NDArray[np.float32]) -> NDArray[np.float32]:
        logprobs: rpc.Matrix = await self._one(rpc.Classify(rpc.Matrix.of(pixels_BD)))
        return logprobs.numpy()

    async def check(self) -> None:
        await self._one(rpc.Check(), takes_room=False)

    def join(self, member: ReplicaConnection) -> None:
        self._members.append(member)
        self._changed()

    def hear(self, member: ReplicaConnection, message: rpc.Chunk | rpc.Result | rpc.Error) -> None:
        """Something of the work of a member."""
        if isinstance(message, rpc.Chunk):
            if message.id in member.doing:
                member.doing[message.id][0].put_nowait(message)
            return
        arrived, takes_room = member.doing.pop(message.id)
        arrived.put_nowait(message)
        if takes_room:
            self._give_back(member)

    def leave(self, member: ReplicaConnection) -> None:
        """A member goes when it has done what it has begun."""
        member.leaving = True
        self._changed()
        member.link.send(rpc.Drained())

    def lose(self, member: ReplicaConnection) -> None:
        self._members.remove(member)
        for arrived, _ in member.doing.values():
            arrived.put_nowait(None)
        self._changed()

    async def _one(self, work: rpc.Work, takes_room: bool = True) -> Any:
        for attempt in range(TRIES):
            try:
                async with self._asked(work, takes_room) as arrived:
                    came = _sound(await arrived.get())
                    assert isinstance(came, rpc.Result)
                    return came.value
            except ReplicaDied:
                if attempt == TRIES - 1:
                    raise
        raise AssertionError

    @asynccontextmanager
    async def _asked(self, work: rpc.Work, takes_room: bool) -> AsyncIterator[Arrived]:
        id_, arrived = next(IDS), Arrived()
        framed = rpc.encode_frame(rpc.Request(id_, work))  # what cannot be sent takes no room
        member = await self._with_room() if takes_room else await self._any()
        if not member.link.open:
            raise ReplicaDied
        member.doing[id_] = arrived, takes_room
        member.link.send_frame(framed)
        try:
            yield arrived
        finally:
            if id_ in member.doing:  # its room is free when the replica says so
                member.link.send(rpc.Cancel(id_))

    async def _with_room(self) -> ReplicaConnection:
        if not any(member.free for member in self._members):
            self._insist_on_place()
        turn: asyncio.Future[ReplicaConnection] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        self._changed()
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._give_back(turn.result())
            raise

    async def _any(self) -> ReplicaConnection:
        while True:
            staying = [member for member in self._members if not member.leaving]
            if staying:
                return min(staying, key=lambda each: len(each.doing))
            self._insist_on_place()
            self._hoping += 1
            try:
                await self._somebody.wait()
            finally:
                self._hoping -= 1

    def _insist_on_place(self) -> None:
        load = self.load
        if load.waiting >= self.most_waiting:
            raise Busy(f"{load.running} requests are being answered and {load.waiting} wait; ask again")

    def _give_back(self, member: ReplicaConnection) -> None:
        member.taken -= 1
        self._changed()

    def _changed(self) -> None:
        """Let those that wait have what room there is."""
        if any(not member.leaving for member in self._members):
            self._somebody.set()
        else:
            self._somebody.clear()
        while self._waiting:
            if self._waiting[0].done():
                self._waiting.popleft()
                continue
            free = [member for member in self._members if member.free]
            if not free:
                return
            member = min(free, key=lambda each: each.taken / each.room)
            member.taken += 1
            self._waiting.popleft().set_result(member)


class ReplicaServer:
    """Where replicas call."""

    def __init__(self) -> None:
        self._crews: dict[str, ReplicaPool] = {}
        self._known: dict[rpc.Connection, tuple[ReplicaPool, ReplicaConnection]] = {}
        self._secret = secrets.token_urlsafe(32)
        self._server: asyncio.Server | None = None

    async def open(self, host: str) -> rpc.GatewayAddress:
        """Listen, at any free port."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._link, host, 0)
        return rpc.GatewayAddress(host, self._server.sockets[0].getsockname()[1], self._secret)

    def crew(self, package: str) -> ReplicaPool:
        return self._crews.setdefault(package, ReplicaPool())

    @property
    def loads(self) -> dict[str, ReplicaLoad]:
        return {package: crew.load for package, crew in self._crews.items()}

    def keep(self, packages: set[str]) -> None:
        """Forget the crews of others, of which nobody is left."""
        for package in set(self._crews) - packages:
            if self._crews[package].load == ReplicaLoad(0, 0, 0):
                del self._crews[package]

    def close(self) -> None:
        """Listen no longer."""
        if self._server is not None:
            self._server.close()
        for link in list(self._known):
            link.close()

    def _link(self) -> rpc.Connection:
        link = rpc.Connection(rpc.FromReplica, self._received, self._lost, rpc.STRANGER_BYTES)
        asyncio.get_running_loop().call_later(STRANGER_S, partial(self._insist_on_hello, link))
        return link

    def _insist_on_hello(self, link: rpc.Connection) -> None:
        if link not in self._known:
            link.close()

    def _received(self, link: rpc.Connection, message: rpc.FromReplica) -> None:
        if link not in self._known:
            if not isinstance(message, rpc.Hello) or not secrets.compare_digest(message.secret, self._secret):
                link.close()
                return
            link.most_bytes = rpc.MOST_BYTES
            crew, member = self.crew(message.package), ReplicaConnection(link, message.room)
            self._known[link] = crew, member
            crew.join(member)
            return
        crew, member = self._known[link]
        if isinstance(message, rpc.Drain):
            crew.leave(member)
        elif not isinstance(message, rpc.Hello):
            crew.hear(member, message)

    def _lost(self, link: rpc.Connection) -> None:
        known = self._known.pop(link, None)
        if known is not None:
            crew, member = known
            crew.lose(member)


def _sound(came: rpc.Chunk | rpc.Result | rpc.Error | None) -> rpc.Chunk | rpc.Result:
    """What arrived, unless it is that something went wrong."""
    if came is None:
        raise ReplicaDied("the replica died before it had answered")
    if isinstance(came, rpc.Error):
        raise (InputError if came.of_the_request else RuntimeError)(came.message)
    return came
