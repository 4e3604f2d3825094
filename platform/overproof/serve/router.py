"""The gateway's side of the connections to replicas: which are there, which has capacity, and the queue for it."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from overproof.engines.base import Piece, Sampling, ToolSyntax
from overproof.errors import InputError
from overproof.serve import rpc
from overproof.serve.async_engine import Busy, Generation, OnWork, Prompt, Work, ignore_work
from overproof.serve.fair_queue import FairQueue

MAX_ATTEMPTS = 2  # at a request when its replica dies before a part of the answer was sent: it may be what killed it
DEATHS_COUNT_S = 600.0  # for so long a request over which as many replicas died is not taken again
HELLO_TIMEOUT_S = 5.0  # for a new connection to authenticate
REQUEST_IDS, REPLICA_NUMBERS = count(), count()


class ReplicaDied(Exception):
    """The connection to a replica was lost."""


ResponseQueue = asyncio.Queue[rpc.Chunk | rpc.Result | rpc.Error | None]  # None: the replica is gone


@dataclass(frozen=True)
class PendingRequest:
    """A request that a replica has not finished."""

    responses: ResponseQueue
    takes_slot: bool
    on_work: OnWork
    streamed: Work = field(default_factory=Work)  # as the pieces say, for a replica that dies

    def end(self, response: rpc.Result | rpc.Error | None) -> None:
        """The replica has ended it, or is gone."""
        self.responses.put_nowait(response)
        work = self.streamed if response is None else response.work
        if work is not None:
            self.on_work(work)


@dataclass(eq=False)
class ReplicaConnection:
    """A connected replica."""

    connection: rpc.Connection
    capacity: int
    in_flight: Counter[bool] = field(default_factory=Counter)  # requests that take a slot, and those that take none
    number: int = field(default_factory=REPLICA_NUMBERS.__next__)
    draining: bool = False
    pending: dict[int, PendingRequest] = field(default_factory=dict)  # by request id

    def has_room(self, takes_slot: bool) -> bool:
        """Whether it takes one more of these requests."""
        return not self.draining and self.in_flight[takes_slot] < (self.capacity if takes_slot else rpc.SMALL_AT_ONCE)


class RoomyReplicas:
    """The replicas that take one more request, by how many they have: the least busy one is found, and one is moved, in
    a time that does not grow with their number. Of several the one that has had its requests for longest is the next.
    """

    def __init__(self, takes_slot: bool) -> None:
        self._takes_slot = takes_slot
        self._by_count: list[dict[ReplicaConnection, None]] = []
        self._counts: dict[ReplicaConnection, int] = {}
        self._least = 0  # nobody has fewer

    @property
    def least_busy(self) -> ReplicaConnection | None:
        """The replica that takes the next request; None where none has room."""
        if not self._counts:
            return None
        while not self._by_count[self._least]:
            self._least += 1
        return next(iter(self._by_count[self._least]))

    def update(self, replica: ReplicaConnection, connected: bool = True) -> None:
        """Take in what has changed of a replica."""
        if replica in self._counts:
            del self._by_count[self._counts.pop(replica)][replica]
        if connected and replica.has_room(self._takes_slot):
            count = self._counts[replica] = replica.in_flight[self._takes_slot]
            while len(self._by_count) <= count:
                self._by_count.append({})
            self._by_count[count][replica] = None
            self._least = min(self._least, count)


@dataclass(frozen=True)
class ReplicaLoad:
    """The replicas of a package, and its requests that run or wait."""

    replicas: int
    running: int
    waiting: int

    @property
    def requests(self) -> int:
        return self.running + self.waiting


class DeadlyRequests:
    """Requests over which replicas died: from the second death on they are refused for a while, for they may be why."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._deaths: dict[str, tuple[frozenset[int], float]] = {}  # by hash: replicas, and until when they count

    def on_death(self, operation: rpc.Operation, replica: int) -> None:
        """A replica died over a request, and maybe over others like it: it counts once."""
        now_s, key = self._clock(), _request_hash(operation)
        self._deaths = {each: found for each, found in self._deaths.items() if found[1] > now_s}
        dead, _ = self._deaths.get(key, (frozenset[int](), 0.0))
        self._deaths[key] = dead | {replica}, now_s + DEATHS_COUNT_S

    def refuse(self, operation: rpc.Operation) -> None:
        """Look whether a request is one of them.

        Raises:
            InputError: it is.
        """
        if not self._deaths:
            return
        dead, until_s = self._deaths.get(_request_hash(operation), (frozenset[int](), 0.0))
        if len(dead) >= MAX_ATTEMPTS and until_s > self._clock():
            raise InputError(
                f"{len(dead)} replicas ended while they answered this request ({_request_hash(operation)[:16]}); it is "
                "refused for some minutes: change it, or ask the operator, whose logs say how they ended"
            )


def _request_hash(operation: rpc.Operation) -> str:
    return hashlib.sha256(rpc.encode_frame(rpc.Request(0, operation))).hexdigest()


class ReplicaPool:
    """All replicas of a package as one ``AsyncEngine``: the least busy one takes the next request, and where none has
    capacity requests wait, clients in turn, ``queued_per_replica`` of each for every replica there is.

    Requests that cost little (a check, a chat template) take no slot, and wait for no other ones than their like.
    """

    def __init__(self) -> None:
        self.queued_per_replica = 0
        self._replicas: dict[ReplicaConnection, None] = {}
        self._taking = 0  # replicas that are not draining
        self._roomy = {takes_slot: RoomyReplicas(takes_slot) for takes_slot in (True, False)}
        self._queues = {takes_slot: FairQueue[ReplicaConnection]() for takes_slot in (True, False)}
        self._deadly = DeadlyRequests()

    @property
    def load(self) -> ReplicaLoad:
        running = sum(replica.in_flight[True] for replica in self._replicas)
        return ReplicaLoad(self._taking, running, sum(map(len, self._queues.values())))

    @property
    def max_queued(self) -> int:
        """Requests of one client that may wait; as many as for one replica while there is none."""
        return self.queued_per_replica * max(1, self._taking)

    async def complete(self, prompt: Prompt, sampling: Sampling, on_work: OnWork = ignore_work) -> Generation:
        generation: Generation = await self._call(rpc.Complete(prompt, sampling), on_work=on_work)
        return generation

    async def validate(self, prompt: Prompt, sampling: Sampling) -> None:
        await self._call(rpc.Validate(prompt, sampling), takes_slot=False)

    async def stream(self, prompt: Prompt, sampling: Sampling, on_work: OnWork = ignore_work) -> AsyncGenerator[Piece]:
        operation = rpc.Stream(prompt, sampling)
        for attempt in range(MAX_ATTEMPTS):
            started = False
            try:
                async with self._dispatched(operation, takes_slot=True, on_work=on_work) as responses:
                    while isinstance(response := _raise_error(await responses.get()), rpc.Chunk):
                        started = True
                        yield response.piece
                return
            except ReplicaDied:
                if started or attempt == MAX_ATTEMPTS - 1:
                    raise

    async def chat_prompt(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        operation = rpc.ChatPrompt([dict(message) for message in messages], [dict(tool) for tool in tools])
        prompt: str = await self._call(operation, takes_slot=False)
        return prompt

    async def tool_syntax(self) -> ToolSyntax:
        found: rpc.CallSyntax = await self._call(rpc.DescribeCalls(), takes_slot=False)
        return ToolSyntax(found.before_name, found.before_arguments, found.after)

    async def detokenize(self, ids: Sequence[int]) -> str:
        text: str = await self._call(rpc.Detokenize(ids), takes_slot=False)
        return text

    async def logprobs(self, inputs_BD: NDArray[np.float32]) -> NDArray[np.float32]:
        logprobs_BV: rpc.Matrix = await self._call(rpc.Logprobs(rpc.Matrix.from_numpy(inputs_BD)))
        return logprobs_BV.to_numpy()

    async def check(self) -> None:
        await self._call(rpc.Check(), takes_slot=False)

    def add(self, replica: ReplicaConnection) -> None:
        self._replicas[replica] = None
        self._taking += 1
        self._update(replica)

    def on_message(self, replica: ReplicaConnection, message: rpc.Chunk | rpc.Result | rpc.Error) -> None:
        """Hand a response on to the request that waits for it."""
        if isinstance(message, rpc.Chunk):
            if message.id in replica.pending:
                pending, piece = replica.pending[message.id], message.piece
                pending.streamed.prompt_tokens, pending.streamed.completion_tokens = (
                    piece.prompt_tokens, piece.completion_tokens,
                )  # fmt: skip
                pending.responses.put_nowait(message)
            return
        request = replica.pending.pop(message.id)
        request.end(message)
        self._release(replica, request.takes_slot)

    def drain(self, replica: ReplicaConnection) -> None:
        """Send a replica no more requests; it goes when it has answered those it has."""
        self._taking -= not replica.draining
        replica.draining = True
        self._update(replica)
        replica.connection.send(rpc.Drained())

    def remove(self, replica: ReplicaConnection) -> None:
        del self._replicas[replica]
        self._taking -= not replica.draining
        for request in replica.pending.values():
            request.end(None)
        self._update(replica)

    async def _call(self, operation: rpc.Operation, takes_slot: bool = True, on_work: OnWork = ignore_work) -> Any:
        for attempt in range(MAX_ATTEMPTS):
            try:
                async with self._dispatched(operation, takes_slot, on_work) as responses:
                    response = _raise_error(await responses.get())
                    assert isinstance(response, rpc.Result)
                    return response.value
            except ReplicaDied:
                if attempt == MAX_ATTEMPTS - 1:
                    raise
        raise AssertionError

    @asynccontextmanager
    async def _dispatched(
        self, operation: rpc.Operation, takes_slot: bool, on_work: OnWork
    ) -> AsyncIterator[ResponseQueue]:
        """The responses of a request that was sent to a replica; leaving early cancels it there."""
        self._deadly.refuse(operation)
        id_, responses = next(REQUEST_IDS), ResponseQueue()
        frame = rpc.encode_frame(rpc.Request(id_, operation))  # first: what cannot be sent must take no slot
        replica = await self._acquire(takes_slot)
        if not replica.connection.open:
            raise ReplicaDied
        replica.pending[id_] = PendingRequest(responses, takes_slot, on_work)
        replica.connection.send_frame(frame)
        try:
            yield responses
        except ReplicaDied:
            self._deadly.on_death(operation, replica.number)
            raise
        finally:
            if id_ in replica.pending:  # its slot is free when the replica confirms
                replica.connection.send(rpc.Cancel(id_))

    async def _acquire(self, takes_slot: bool) -> ReplicaConnection:
        queue = self._queues[takes_slot]
        if queue.own >= self.max_queued and self._roomy[takes_slot].least_busy is None:
            raise Busy(f"{self.load.running} requests are being answered and {queue.own} of yours wait; ask again")
        given = queue.put()
        self._assign_queued()
        try:
            return await given
        except asyncio.CancelledError:
            queue.discard(given)
            if given.done() and not given.cancelled():
                self._release(given.result(), takes_slot)
            raise

    def _release(self, replica: ReplicaConnection, takes_slot: bool) -> None:
        replica.in_flight[takes_slot] -= 1
        self._update(replica)

    def _update(self, replica: ReplicaConnection) -> None:
        for roomy in self._roomy.values():
            roomy.update(replica, replica in self._replicas)
        self._assign_queued()

    def _assign_queued(self) -> None:
        """Give the capacity there is to the requests that wait for it."""
        for takes_slot, queue in self._queues.items():
            roomy = self._roomy[takes_slot]
            while (replica := roomy.least_busy) and (waiting := queue.pop()):
                replica.in_flight[takes_slot] += 1
                roomy.update(replica)
                waiting.set_result(replica)


class ReplicaServer:
    """Accepts the connections of replicas, and keeps one pool for each package."""

    def __init__(self) -> None:
        self._pools: dict[str, ReplicaPool] = {}
        self._replicas: dict[rpc.Connection, tuple[ReplicaPool, ReplicaConnection]] = {}  # authenticated ones
        self._secret = secrets.token_urlsafe(32)
        self._server: asyncio.Server | None = None

    async def listen(self, host: str) -> rpc.GatewayAddress:
        """Listen, at any free port."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._accept, host, 0)
        return rpc.GatewayAddress(host, self._server.sockets[0].getsockname()[1], self._secret)

    def close(self) -> None:
        """Listen no longer, and close every connection."""
        if self._server is not None:
            self._server.close()
        for connection in list(self._replicas):
            connection.close()

    def pool(self, package: str) -> ReplicaPool:
        """The replicas of a package, be there any or not yet."""
        return self._pools.setdefault(package, ReplicaPool())

    @property
    def loads(self) -> dict[str, ReplicaLoad]:
        """By package."""
        return {package: pool.load for package, pool in self._pools.items()}

    def discard_others(self, packages: set[str]) -> None:
        """Drop the pools of other packages that have neither replicas nor requests."""
        for package in set(self._pools) - packages:
            if self._pools[package].load == ReplicaLoad(0, 0, 0):
                del self._pools[package]

    def _accept(self) -> rpc.Connection:
        connection = rpc.Connection(rpc.FromReplica, self._on_message, self._on_close, rpc.MAX_HELLO_BYTES)
        asyncio.get_running_loop().call_later(HELLO_TIMEOUT_S, partial(self._require_hello, connection))
        return connection

    def _require_hello(self, connection: rpc.Connection) -> None:
        if connection not in self._replicas:
            connection.close()

    def _on_message(self, connection: rpc.Connection, message: rpc.FromReplica) -> None:
        if connection not in self._replicas:
            if not isinstance(message, rpc.Hello) or not secrets.compare_digest(message.secret, self._secret):
                connection.close()
                return
            connection.max_frame_bytes = rpc.MAX_FRAME_BYTES
            pool, replica = self.pool(message.package), ReplicaConnection(connection, message.capacity)
            self._replicas[connection] = pool, replica
            pool.add(replica)
            return
        pool, replica = self._replicas[connection]
        if isinstance(message, rpc.Drain):
            pool.drain(replica)
        elif not isinstance(message, rpc.Hello):
            pool.on_message(replica, message)

    def _on_close(self, connection: rpc.Connection) -> None:
        authenticated = self._replicas.pop(connection, None)
        if authenticated is not None:
            pool, replica = authenticated
            pool.remove(replica)


def _raise_error(response: rpc.Chunk | rpc.Result | rpc.Error | None) -> rpc.Chunk | rpc.Result:
    """The response, raised where it is an error or the replica is gone."""
    if response is None:
        raise ReplicaDied("the replica died before it had answered")
    if isinstance(response, rpc.Error):
        if response.is_request_error:
            raise InputError(response.message, response.code)
        raise RuntimeError(response.message)
    return response
