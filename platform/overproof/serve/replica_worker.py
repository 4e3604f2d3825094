"""A replica's side of the connection: it connects to the gateway, and answers its requests until it is drained."""

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

# Takes the known address; returns when there is another one, or after a while.
FindGateway = Callable[[rpc.GatewayAddress | None], Coroutine[Any, Any, rpc.GatewayAddress | None]]


class ReplicaWorker:
    """Stays connected to the current gateway; one that is being replaced is answered until it closes the connection.

    ``capacity`` is the number of requests that it takes at once.
    """

    def __init__(self, engine: AsyncEngine, package: str, capacity: int, find_gateway: FindGateway) -> None:
        self._engine, self._package, self._capacity, self._find_gateway = engine, package, capacity, find_gateway
        self._connections: set[rpc.Connection] = set()
        self._tasks: dict[tuple[rpc.Connection, int], asyncio.Task[None]] = {}  # by request id
        self._work: dict[tuple[rpc.Connection, int], Work] = {}  # of generations that have ended
        self._connection_closed, self._progress = asyncio.Event(), asyncio.Event()
        self._undrained: set[rpc.Connection] = set()  # whose gateways have not confirmed that they send no more
        self._connecting = asyncio.ensure_future(self._stay_connected())

    async def drain(self) -> None:
        """Return when no more requests come and all that came are answered."""
        self._connecting.cancel()
        self._undrained = set(self._connections)
        for connection in self._connections:
            connection.send(rpc.Drain())
        while self._undrained or self._tasks:
            self._progress.clear()
            await self._progress.wait()
        for connection in list(self._connections):
            connection.close()

    async def _stay_connected(self) -> None:
        known: rpc.GatewayAddress | None = None
        while True:
            if not self._connections:
                known = None
            self._connection_closed.clear()
            try:
                address = await self._next_address(known)
                if address is not None and address != known:
                    await self._connect(address)
                    known = address
                    continue
            except Exception as error:  # the controller or the gateway is being replaced
                LOG.info("connecting to the gateway: %s", error)
            if not self._connections:
                await asyncio.sleep(RETRY_S)

    async def _next_address(self, known: rpc.GatewayAddress | None) -> rpc.GatewayAddress | None:
        """The gateway's address once it has changed; None where a connection was closed before that."""
        lookup = asyncio.ensure_future(self._find_gateway(known))
        closed = asyncio.ensure_future(self._connection_closed.wait())
        try:
            await asyncio.wait((lookup, closed), return_when=asyncio.FIRST_COMPLETED)
            return lookup.result() if lookup.done() else None
        finally:
            lookup.cancel()
            closed.cancel()

    async def _connect(self, address: rpc.GatewayAddress) -> None:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(CONNECT_TIMEOUT_S):  # a machine that is gone does not even refuse
            _, connection = await loop.create_connection(
                lambda: rpc.Connection(rpc.FromGateway, self._on_message, self._on_close), address.host, address.port
            )
        self._connections.add(connection)
        connection.send(rpc.Hello(address.secret, self._package, self._capacity))

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
        self._connection_closed.set()
        self._progress.set()

    async def _answer(self, connection: rpc.Connection, id_: int, operation: rpc.Operation) -> None:
        request = connection, id_
        on_work = partial(self._work.__setitem__, request)
        answer: rpc.Result | rpc.Error
        try:
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
