"""Queues in which clients take turns, so that whoever asks for much waits for himself alone."""

from __future__ import annotations

import asyncio
from contextvars import ContextVar
from typing import Generic, TypeVar

CLIENT: ContextVar[str] = ContextVar("client", default="")  # of the request in progress: its key's name, or its address

GivenT = TypeVar("GivenT")


class FairQueue(Generic[GivenT]):
    """Futures that wait to be given something: those of a client in their order, and clients in turn."""

    def __init__(self) -> None:
        self._waiting: dict[str, dict[asyncio.Future[GivenT], None]] = {}  # by client, the next one first
        self._length = 0

    def __len__(self) -> int:
        return self._length

    @property
    def own(self) -> int:
        """How many of this client wait."""
        return len(self._waiting.get(CLIENT.get(), ()))

    def put(self) -> asyncio.Future[GivenT]:
        """Another one of this client; ``discard`` it where nobody waits for it any more."""
        added: asyncio.Future[GivenT] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(CLIENT.get(), {})[added] = None
        self._length += 1
        return added

    def discard(self, waiting: asyncio.Future[GivenT]) -> None:
        """Take out one of this client, if it still waits."""
        client = CLIENT.get()
        own = self._waiting.get(client, {})
        if waiting in own:
            del own[waiting]
            self._length -= 1
            if not own:
                del self._waiting[client]

    def pop(self) -> asyncio.Future[GivenT] | None:
        """The next one, None where there is none; its client is the last one then."""
        while self._waiting:
            client = next(iter(self._waiting))
            own = self._waiting.pop(client)
            while own:
                first = next(iter(own))
                del own[first]
                self._length -= 1
                if not first.done():  # which is cancelled, and not discarded yet
                    if own:
                        self._waiting[client] = own
                    return first
        return None


class FairSemaphore:
    """As ``asyncio.Semaphore``, with clients in turn."""

    def __init__(self, value: int) -> None:
        self._free, self._queue = value, FairQueue[None]()

    @property
    def own_waiting(self) -> int:
        """How many of this client wait."""
        return self._queue.own

    async def __aenter__(self) -> None:
        if self._free:
            self._free -= 1
            return
        turn = self._queue.put()
        try:
            await turn
        except asyncio.CancelledError:
            self._queue.discard(turn)
            if turn.done() and not turn.cancelled():
                self._release()
            raise

    async def __aexit__(self, *_: object) -> None:
        self._release()

    def _release(self) -> None:
        turn = self._queue.pop()
        if turn is None:
            self._free += 1
        else:
            turn.set_result(None)
