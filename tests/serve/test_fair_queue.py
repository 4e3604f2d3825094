"""Clients take turns, whoever asks how often."""

from __future__ import annotations

import asyncio

from overproof.serve.fair_queue import CLIENT, FairQueue, FairSemaphore


def test_clients_take_turns_and_those_that_gave_up_none() -> None:
    async def work() -> None:
        queue = FairQueue[int]()
        puts = []
        for client in ("a", "a", "a", "b", "c", "b"):
            CLIENT.set(client)
            puts.append(queue.put())
        assert (len(queue), queue.own) == (6, 2)
        puts[1].cancel()
        order = [puts.index(waiting) for waiting in iter(queue.pop, None) if waiting.set_result(0) is None]
        assert order == [0, 3, 4, 2, 5]
        assert (len(queue), queue.own) == (0, 0)

    asyncio.run(work())


def test_a_semaphore_serves_a_single_request_amid_a_flood() -> None:
    async def work() -> None:
        semaphore, began = FairSemaphore(1), list[str]()

        async def request(client: str) -> None:
            CLIENT.set(client)
            async with semaphore:
                began.append(client)
                await asyncio.sleep(0)

        flood = [asyncio.ensure_future(request("flood")) for _ in range(20)]
        await asyncio.sleep(0)
        honest = asyncio.ensure_future(request("honest"))
        await asyncio.sleep(0)
        flood[-1].cancel()
        await asyncio.gather(*flood, honest, return_exceptions=True)
        assert began.index("honest") < 5
        assert len(began) == 20
        async with semaphore:  # nothing is lost
            pass

    asyncio.run(work())
