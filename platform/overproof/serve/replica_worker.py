"""A replica's side of the connections: it connects to every gateway, and answers their requests until it is drained."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from dataclasses import asdict
from functools import partial
from typing import Any

from overproof.errors import InputError
from overproof.serve import rpc
from overproof.serve.async_engine import AsyncEngine, OnWork, Work

LOG = logging.getLogger("ray.serve")
RETRY_S, CONNECT_TIMEOUT_S = 0.2, 5.0

# Takes the known addresses; returns when there are others, or after a while.
FindGateways = Callable[[frozenset[rpc.GatewayAddress]], Coroutine[Any, Any, frozenset[rpc.GatewayAddress]]]


class ReplicaWorker:
    """Stays connected to every gateway; one that is going is answered until it closes the connection.

    ``capacity`` is the number of requests that it works at at once, whichever gateways they come from; each gateway may
    send as many, which wait here in their order.
    """

    def __init__(self, engine: AsyncEngine, package: str, capacity: int, find_gateways: FindGateways) -> None:
        self._engine, self._package, self._capacity, self._find_gateways = engine, package, capacity, find_gateways
        self._room = {True: asyncio.Semaphore(capacity), False: asyncio.Semaphore(rpc.SMALL_AT_ONCE)}
        self._gateways: frozenset[rpc.GatewayAddress] = frozenset()  # that there are
        self._connecting: dict[rpc.GatewayAddress, asyncio.Task[None]] = {}
        self._connections: set[rpc.Connection] = set()
        self._tasks: dict[tuple[rpc.Connection, int], asyncio.Task[None]] = {}  # by request id
        self._work: dict[tuple[rpc.Connection, int], Work] = {}  # of generations that have ended
        self._progress = asyncio.Event()
        self._undrained: set[rpc.Connection] = set()  # whose gateways have not confirmed that they send no more
        self._following = asyncio.ensure_future(self._follow_gateways())

    async def drain(self) -> None:
        """Return when no more requests come and all that came are answered."""
        for task in (self._following, *self._connecting.values()):
            task.cancel()
        self._undrained = set(self._connections)
        for connection in self._connections:
            connection.send(rpc.Drain())
        while self._undrained or self._tasks:
            self._progress.clear()
            await self._progress.wait()
        for connection in list(self._connections):
            connection.close()

    async def _follow_gateways(self) -> None:
        while True:
            try:
                self._gateways = await self._find_gateways(self._gateways)
            except Exception as error:  # the controller is being replaced
                LOG.info("looking for gateways: %s", error)
                await asyncio.sleep(RETRY_S)
            for address in self._gateways - self._connecting.keys():
                self._connecting[address] = asyncio.ensure_future(self._stay_connected(address))

    async def _stay_connected(self, address: rpc.GatewayAddress) -> None:
        while address in self._gateways:
            try:
                await self._connect(address)
            except OSError as error:  # a TimeoutError is one; the gateway is gone, or its node is
                LOG.info("connecting to the gateway at %s: %s", address.host, error)
            await asyncio.sleep(RETRY_S)
        del self._connecting[address]

    async def _connect(self, address: rpc.GatewayAddress) -> None:
        """Connect, and return when the connection is closed."""
        loop, closed = asyncio.get_running_loop(), asyncio.Event()

        def on_close(connection: rpc.Connection) -> None:
            self._on_close(connection)
            closed.set()

        async with asyncio.timeout(CONNECT_TIMEOUT_S):  # a machine that is gone does not even refuse
            _, connection = await loop.create_connection(
                lambda: rpc.Connection(rpc.FromGateway, self._on_message, on_close), address.host, address.port
            )
        if not closed.is_set():
            self._connections.add(connection)
            connection.send(rpc.Hello(address.secret, self._package, self._capacity))
        await closed.wait()

    def _on_message(self, connection: rpc.Connection, message: rpc.FromGateway) -> None:
        match message:
            case rpc.Request(id_, operation):
                task = asyncio.ensure_future(self._answer(connection, id_, operation))
                self._tasks[connection, id_] = task
                task.add_done_callback(lambda finished: self._on_task_done(connection, id_, finished))
            case rpc.Cancel(id_):
                task_or_none = self._tasks.get((connection, id_))
                if task_or_none is not None:
                    task_or_none.cancel()
            case rpc.Drained():
                self._undrained.discard(connection)
                self._progress.set()

    def _on_task_done(self, connection: rpc.Connection, id_: int, task: asyncio.Task[None]) -> None:
        if task.cancelled():  # perhaps before it had started: the gateway waits for an end of every request
            work = self._work.pop((connection, id_), None)
            connection.send(rpc.Error(id_, "the request was cancelled", False, work=work))
        del self._tasks[connection, id_]
        self._progress.set()

    def _on_close(self, connection: rpc.Connection) -> None:
        self._connections.discard(connection)
        self._undrained.discard(connection)
        for (owner, _), task in list(self._tasks.items()):
            if owner is connection:
                task.cancel()
        self._progress.set()

    async def _answer(self, connection: rpc.Connection, id_: int, operation: rpc.Operation) -> None:
        request = connection, id_
        on_work = partial(self._work.__setitem__, request)
        answer: rpc.Result | rpc.Error
        try:
            async with self._room[isinstance(operation, rpc.GENERATING)]:
                if isinstance(operation, rpc.Stream):
                    async with aclosing(self._engine.stream(operation.prompt, operation.sampling, on_work)) as pieces:
                        async for piece in pieces:
                            connection.send(rpc.Chunk(id_, piece))
                    answer = rpc.Result(id_)
                else:
                    answer = rpc.Result(id_, await self._execute(operation, on_work))
        except InputError as error:
            answer = rpc.Error(id_, str(error), True, error.code)
        except Exception as error:
            LOG.exception("a request failed")
            answer = rpc.Error(id_, f"{type(error).__name__}: {error}", False)
        answer.work = self._work.pop(request, None)
        connection.send(answer)

    async def _execute(self, operation: rpc.Operation, on_work: OnWork) -> rpc.ResultValue:
        engine = self._engine
        match operation:
            case rpc.Complete(prompt, sampling):
                return await engine.complete(prompt, sampling, on_work)
            case rpc.Validate(prompt, sampling):
                await engine.validate(prompt, sampling)
            case rpc.ChatPrompt(messages, tools):
                return await engine.chat_prompt(messages, tools)
            case rpc.DescribeCalls():
                return rpc.CallSyntax(**asdict(await engine.tool_syntax()))
            case rpc.Detokenize(ids):
                return await engine.detokenize(ids)
            case rpc.Logprobs(inputs):
                return rpc.Matrix.from_numpy(await engine.logprobs(inputs.to_numpy()))
            case rpc.Check():
                await engine.check()
        return None
