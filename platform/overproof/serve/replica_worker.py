"""A replica at its post: it calls the gateway, and does what it is asked until it leaves."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from typing import Any

from overproof.errors import InputError
from overproof.serve import rpc
from overproof.serve.async_engine import AsyncEngine

LOG = logging.getLogger("ray.serve")
RETRY_S, DIAL_S = 0.2, 5.0


# Answered when the door is another than the one seen, or after a while.
FindGateway = Callable[[rpc.GatewayAddress | None], Coroutine[Any, Any, rpc.GatewayAddress | None]]


class ReplicaWorker:
    """Keeps a connection to the gateway there is; one that is being replaced is served until it hangs up."""

    def __init__(self, backend: AsyncEngine, package: str, room: int, door: FindGateway) -> None:
        self._backend, self._package, self._room, self._door = backend, package, room, door
        self._links: set[rpc.Connection] = set()
        self._tasks: dict[tuple[rpc.Connection, int], asyncio.Task[None]] = {}
        self._hung_up, self._done = asyncio.Event(), asyncio.Event()
        self._unanswered: set[rpc.Connection] = set()  # of those that were told of leaving
        self._calling = asyncio.ensure_future(self._call())

    async def leave(self) -> None:
        """Return when no more work comes, and what was begun is done."""
        self._calling.cancel()
        self._unanswered = set(self._links)
        for link in self._links:
            link.send(rpc.Drain())
        while self._unanswered or self._tasks:
            self._done.clear()
            await self._done.wait()
        for link in list(self._links):
            link.close()

    async def _call(self) -> None:
        seen: rpc.GatewayAddress | None = None
        while True:
            if not self._links:
                seen = None
            self._hung_up.clear()
            try:
                found = await self._next(seen)
                if found is not None and found != seen:
                    await self._dial(found)
                    seen = found
                    continue
            except Exception as error:  # whom we call is being replaced
                LOG.info("calling the gateway: %s", error)
            if not self._links:
                await asyncio.sleep(RETRY_S)

    async def _next(self, seen: rpc.GatewayAddress | None) -> rpc.GatewayAddress | None:
        """The gateway's door, when it is another or nobody is on the line."""
        asked = asyncio.ensure_future(self._door(seen))
        hung_up = asyncio.ensure_future(self._hung_up.wait())
        try:
            await asyncio.wait((asked, hung_up), return_when=asyncio.FIRST_COMPLETED)
            return asked.result() if asked.done() else None
        finally:
            asked.cancel()
            hung_up.cancel()

    async def _dial(self, found: rpc.GatewayAddress) -> None:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(DIAL_S):  # a machine that is gone does not even refuse
            _, link = await loop.create_connection(
                lambda: rpc.Connection(rpc.FromGateway, self._received, self._lost), found.host, found.port
            )
        self._links.add(link)
        link.send(rpc.Hello(found.secret, self._package, self._room))

    def _received(self, link: rpc.Connection, message: rpc.FromGateway) -> None:
        match message:
            case rpc.Request(id_, work):
                task = asyncio.ensure_future(self._do(link, id_, work))
                self._tasks[link, id_] = task
                task.add_done_callback(lambda ended: self._ended(link, id_, ended))
            case rpc.Cancel(id_):
                task_or_none = self._tasks.get((link, id_))
                if task_or_none is not None:
                    task_or_none.cancel()
            case rpc.Drained():
                self._unanswered.discard(link)
                self._done.set()

    def _ended(self, link: rpc.Connection, id_: int, task: asyncio.Task[None]) -> None:
        if task.cancelled():  # perhaps before it had begun: every piece of work has an end that is told
            link.send(rpc.Error(id_, "nobody waits for it any more", False))
        del self._tasks[link, id_]
        self._done.set()

    def _lost(self, link: rpc.Connection) -> None:
        self._links.discard(link)
        self._unanswered.discard(link)
        for (asker, _), task in list(self._tasks.items()):
            if asker is link:
                task.cancel()
        self._hung_up.set()
        self._done.set()

    async def _do(self, link: rpc.Connection, id_: int, work: rpc.Work) -> None:
        try:
            if isinstance(work, rpc.Stream):
                async with aclosing(self._backend.stream(work.prompt, work.sampling)) as pieces:
                    async for piece in pieces:
                        link.send(rpc.Chunk(id_, piece))
                link.send(rpc.Result(id_))
            else:
                link.send(rpc.Result(id_, await self._value(work)))
        except InputError as error:
            link.send(rpc.Error(id_, str(error), True))
        except Exception as error:
            LOG.exception("a request failed")
            link.send(rpc.Error(id_, f"{type(error).__name__}: {error}", False))

    async def _value(self, work: rpc.Work) -> rpc.Value:
        backend = self._backend
        match work:
            case rpc.Complete(prompt, sampling):
                return await backend.complete(prompt, sampling)
            case rpc.Validate(prompt, sampling):
                await backend.accept(prompt, sampling)
            case rpc.ChatPrompt(messages):
                return await backend.chat_prompt(messages)
            case rpc.Detokenize(ids):
                return await backend.detokenize(ids)
            case rpc.Classify(pixels):
                return rpc.Matrix.of(await backend.classify(pixels.numpy()))
            case rpc.Check():
                await backend.check()
        return None
