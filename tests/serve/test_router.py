"""The router and the replica worker without Ray: over real connections, with real engines and scripted ones."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from overproof.engines.base import Piece, Sampling, ToolSyntax
from overproof.engines.llamacpp import LlamaCpp
from overproof.engines.onnx_runtime import OnnxRuntime
from overproof.errors import InputError
from overproof.serve import rpc
from overproof.serve.async_engine import (
    AsyncEngine,
    BatchingEngine,
    Busy,
    Generation,
    OnWork,
    Prompt,
    ThreadedEngine,
    Work,
    ignore_work,
)
from overproof.serve.fair_queue import CLIENT
from overproof.serve.replica_worker import ReplicaWorker
from overproof.serve.router import (
    DEATHS_COUNT_S,
    DeadlyRequests,
    ReplicaConnection,
    ReplicaDied,
    ReplicaLoad,
    ReplicaPool,
    ReplicaServer,
    RoomyReplicas,
)
from overproof.serve.rpc import (
    LENGTH_BYTES,
    MAX_HELLO_BYTES,
    SMALL_AT_ONCE,
    Connection,
    Drain,
    GatewayAddress,
    Hello,
    encode_frame,
)

NAME, HOST, ONE = "package", "127.0.0.1", Sampling(1)
SOON_S = 10


@dataclass
class ScriptedEngine:
    """An engine whose requests end when the test sets ``go_on``."""

    begun: list[Any] = field(default_factory=list)
    ended: list[Any] = field(default_factory=list)
    go_on: asyncio.Event = field(default_factory=asyncio.Event)

    async def complete(self, prompt: Prompt, sampling: Sampling, on_work: OnWork = ignore_work) -> Generation:
        self.begun.append(prompt)
        try:
            await self.go_on.wait()
        finally:
            self.ended.append(prompt)
            on_work(Work(3, 4))
        return Generation(str(prompt), "stop", 1, 1)

    async def validate(self, prompt: Prompt, sampling: Sampling) -> None:
        raise RuntimeError(f"not accepted: {prompt} of {sampling.max_tokens}")

    async def stream(self, prompt: Prompt, sampling: Sampling, on_work: OnWork = ignore_work) -> AsyncGenerator[Piece]:
        self.begun.append(prompt)
        try:
            yield Piece("first", None, 3, 1)
            await self.go_on.wait()
            yield Piece("last", "stop", 1, 2)
        finally:
            self.ended.append(prompt)
            on_work(Work(3, 5))

    async def chat_prompt(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        return " ".join([messages[-1]["content"], *(tool["type"] for tool in tools)])

    async def tool_syntax(self) -> ToolSyntax:
        return ToolSyntax("before", "between", "after")

    async def detokenize(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))

    async def logprobs(self, inputs_BD: NDArray[np.float32]) -> NDArray[np.float32]:
        return inputs_BD

    async def check(self) -> None:
        """It answers."""


class Directory:
    """Where replicas find the gateways: the controller's part in a cluster."""

    def __init__(self) -> None:
        self._addresses = frozenset[GatewayAddress]()
        self._changed = asyncio.Condition()

    async def publish(self, *addresses: GatewayAddress) -> None:
        async with self._changed:
            self._addresses = frozenset(addresses)
            self._changed.notify_all()

    async def find(self, known: frozenset[GatewayAddress]) -> frozenset[GatewayAddress]:
        async with self._changed:
            await self._changed.wait_for(lambda: self._addresses != known)
        return self._addresses


@asynccontextmanager
async def gateway(directory: Directory, max_queued: int = 8) -> AsyncIterator[tuple[ReplicaServer, ReplicaPool]]:
    replica_server = ReplicaServer()
    pool = replica_server.pool(NAME)
    pool.queued_per_replica = max_queued
    await directory.publish(await replica_server.listen(HOST))
    yield replica_server, pool
    replica_server.close()


async def until(reached: Callable[[], bool]) -> None:
    async with asyncio.timeout(SOON_S):
        while not reached():
            await asyncio.sleep(0.01)


def timeless(generation: Generation) -> Generation:
    completion = generation.completion
    if completion is None:
        return generation
    return replace(generation, completion=replace(completion, first_token_s=0, decode_s=0))


def run(test: Awaitable[None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await test

    asyncio.run(bounded())


def test_a_replica_answers_as_its_engine_does(text_package: Path, digits_package: Path) -> None:
    async def test() -> None:
        directory, engine = Directory(), LlamaCpp(text_package / "model.gguf", slots=2)
        local = ThreadedEngine(engine, 4)
        async with gateway(directory) as (replica_server, pool):
            ReplicaWorker(local, NAME, 2, directory.find)
            for sampling in (
                Sampling(8, seed=3, temperature=1.0, stop=("x",), logit_bias={5: -1.0}),
                Sampling(4, logprobs=3),
                Sampling(2, logprobs=2, echo=True),
                Sampling(6, grammar='root ::= "yes" | "no"'),
            ):
                expected = await local.complete("import os\n", sampling)
                assert timeless(await pool.complete("import os\n", sampling)) == timeless(expected)
            async with aclosing(pool.stream([0, 70], Sampling(8))) as pieces:
                texts = [piece.text async for piece in pieces]
            assert "".join(texts) == (await local.complete([0, 70], Sampling(8))).text
            messages = [{"role": "user", "content": "hello"}]
            assert await pool.chat_prompt(messages) == await local.chat_prompt(messages)
            assert await pool.detokenize([70, 71]) == engine.detokenize([70, 71])
            await pool.validate("x", ONE)
            await pool.check()
            for call in (pool.complete("", ONE), pool.validate("", ONE), anext(pool.stream("", ONE))):
                with pytest.raises(InputError, match="prompt: empty"):
                    await call
            images = OnnxRuntime(digits_package / "model.onnx")
            ReplicaWorker(BatchingEngine(images), "digits", 2, directory.find)
            inputs_BD = np.linspace(0, 1, 192, dtype=np.float32).reshape(3, 64)
            classes = replica_server.pool("digits")
            classes.queued_per_replica = 1
            np.testing.assert_array_equal(await classes.logprobs(inputs_BD), images.logprobs(inputs_BD))
            with pytest.raises(InputError, match="64"):
                await classes.logprobs(inputs_BD[:, :3])
        await local.close()

    run(test())


def test_requests_wait_for_capacity_in_their_order_and_the_least_busy_takes_them() -> None:
    async def test() -> None:
        directory, one, two = Directory(), ScriptedEngine(), ScriptedEngine()
        async with gateway(directory, max_queued=2) as (_, pool):
            ReplicaWorker(one, NAME, 2, directory.find)
            await until(lambda: pool.load.replicas == 1)
            calls = [asyncio.ensure_future(pool.complete(str(i), ONE)) for i in range(4)]
            await until(lambda: one.begun == ["0", "1"])
            assert pool.load == ReplicaLoad(1, 2, 2)
            with pytest.raises(Busy, match="2 requests are being answered and 2 of yours wait"):
                await pool.complete("one too many", ONE)
            messages = [{"role": "user", "content": "?"}]
            assert await pool.chat_prompt(messages) == "?"  # takes no slot
            assert await pool.chat_prompt(messages, [{"type": "function"}]) == "? function"
            assert await pool.tool_syntax() == ToolSyntax("before", "between", "after")
            ReplicaWorker(two, NAME, 2, directory.find)
            await until(lambda: two.begun == ["2", "3"])
            two.go_on.set()
            assert [(await each).text for each in calls[2:]] == ["2", "3"]
            assert (await pool.complete("4", ONE)).text == "4"
            assert (one.begun, two.begun) == (["0", "1"], ["2", "3", "4"])
            one.go_on.set()
            await asyncio.gather(*calls)
            assert pool.load == ReplicaLoad(2, 0, 0)

    run(test())


def test_the_least_busy_replica_is_found_whatever_came_and_went() -> None:
    """Against a search of all of them, over random changes."""
    draw = random.Random(0)
    pools, replicas = RoomyReplicas(takes_slot=True), list[ReplicaConnection]()
    for _ in range(3000):
        if not replicas or draw.random() < 0.1:
            changed = ReplicaConnection(Connection(None, lambda *_: None, lambda _: None), draw.randint(1, 5))
            replicas.append(changed)
        else:
            changed = draw.choice(replicas)
            changed.in_flight[True] = max(0, min(changed.capacity, changed.in_flight[True] + draw.choice((-1, 1))))
            changed.draining |= draw.random() < 0.02
            if draw.random() < 0.05:
                replicas.remove(changed)
        pools.update(changed, changed in replicas)
        counts = [each.in_flight[True] for each in replicas if each.has_room(True)]
        found = pools.least_busy
        assert (None if found is None else found.in_flight[True]) == min(counts, default=None)
        assert found is None or (found in replicas and found.has_room(True))


def test_every_replica_lets_more_requests_wait() -> None:
    async def test() -> None:
        directory, engines = Directory(), [ScriptedEngine() for _ in range(3)]
        async with gateway(directory, max_queued=2) as (_, pool):
            for engine in engines:
                ReplicaWorker(engine, NAME, 1, directory.find)
            await until(lambda: pool.load.replicas == 3)
            calls = [asyncio.ensure_future(pool.complete(str(i), ONE)) for i in range(9)]
            await until(lambda: pool.load == ReplicaLoad(3, 3, 6))
            with pytest.raises(Busy, match="3 requests are being answered and 6 of yours wait"):
                await pool.complete("one too many", ONE)
            for engine in engines:
                engine.go_on.set()
            await asyncio.gather(*calls)

    run(test())


def test_clients_take_turns_and_one_that_asks_for_much_is_the_only_one_refused() -> None:
    async def test() -> None:
        directory, engine = Directory(), ScriptedEngine()
        async with gateway(directory, max_queued=3) as (_, pool):
            ReplicaWorker(engine, NAME, 1, directory.find)
            await until(lambda: pool.load.replicas == 1)

            async def ask(client: str) -> str:
                CLIENT.set(client)
                return (await pool.complete(client, ONE)).text

            flood = [asyncio.ensure_future(ask("flood")) for _ in range(8)]
            await until(lambda: sum(each.done() for each in flood) == 4)  # one runs, and three wait
            honest = [asyncio.ensure_future(ask("honest")) for _ in range(2)]
            await until(lambda: engine.begun == ["flood"])
            engine.go_on.set()
            assert await asyncio.gather(*honest) == ["honest"] * 2
            found = await asyncio.gather(*flood, return_exceptions=True)
            assert [type(each) for each in found] == [str] * 4 + [Busy] * 4
            assert max(place for place, client in enumerate(engine.begun) if client == "honest") <= 4

    run(test())


def test_small_requests_wait_for_their_like_alone() -> None:
    class Slow(ScriptedEngine):
        async def tool_syntax(self) -> ToolSyntax:
            self.begun.append("syntax")
            await self.go_on.wait()
            return ToolSyntax("before", "between", "after")

    async def test() -> None:
        directory, engine = Directory(), Slow()
        async with gateway(directory, max_queued=2) as (_, pool):
            ReplicaWorker(engine, NAME, 1, directory.find)
            await until(lambda: pool.load.replicas == 1)
            asked = [asyncio.ensure_future(pool.tool_syntax()) for _ in range(SMALL_AT_ONCE + 3)]
            await until(lambda: asked[-1].done() and len(engine.begun) == SMALL_AT_ONCE)
            with pytest.raises(Busy):
                await asked[-1]
            completed = asyncio.ensure_future(pool.complete("x", ONE))
            await until(lambda: engine.begun[-1] == "x")
            engine.go_on.set()
            await asyncio.gather(completed, *asked[:-1])
            assert engine.begun.count("syntax") == SMALL_AT_ONCE + 2

    run(test())


def test_a_cancelled_request_frees_its_slot() -> None:
    async def test() -> None:
        directory, engine = Directory(), ScriptedEngine()
        async with gateway(directory) as (_, pool):
            ReplicaWorker(engine, NAME, 1, directory.find)
            calls = [asyncio.ensure_future(pool.complete(str(i), ONE)) for i in range(3)]
            await until(lambda: engine.begun == ["0"])
            calls[1].cancel()  # while it waits
            calls[0].cancel()  # while it runs
            await until(lambda: engine.begun == ["0", "2"])
            assert engine.ended == ["0"]
            engine.go_on.set()
            assert (await calls[2]).text == "2"
            for _ in range(3):  # the replica hears of both at once
                hasty = asyncio.ensure_future(pool.complete("never begun", ONE))
                await asyncio.sleep(0)
                hasty.cancel()
            await until(lambda: pool.load == ReplicaLoad(1, 0, 0))
            assert engine.begun == ["0", "2"]
            engine.go_on.clear()
            async with aclosing(pool.stream("3", ONE)) as pieces:
                assert (await anext(pieces)).text == "first"
            await until(lambda: engine.ended == ["0", "2", "3"] and pool.load == ReplicaLoad(1, 0, 0))
            for prompt in ([2**64], [10**100], "\ud800"):
                with pytest.raises(InputError, match="cannot be passed on"):
                    await pool.complete(prompt, ONE)
            assert pool.load == ReplicaLoad(1, 0, 0)
            with pytest.raises(RuntimeError, match="not accepted: x of 1"):
                await pool.validate("x", ONE)

    run(test())


def test_work_is_told_when_it_has_ended_whoever_still_waits() -> None:
    async def test() -> None:
        directory, engine, told = Directory(), ScriptedEngine(), list[Work]()
        async with gateway(directory) as (replica_server, pool):
            ReplicaWorker(engine, NAME, 4, directory.find)
            call = asyncio.ensure_future(pool.complete("0", ONE, told.append))
            await until(lambda: bool(engine.begun))
            call.cancel()
            await until(lambda: told == [Work(3, 4)])
            async with aclosing(pool.stream("1", ONE, told.append)) as pieces:
                await anext(pieces)
            await until(lambda: told == [Work(3, 4), Work(3, 5)])
            async with aclosing(pool.stream("2", ONE, told.append)) as pieces:
                await anext(pieces)
                (connection,) = replica_server._replicas
                assert connection._transport is not None
                connection._transport.abort()
                with pytest.raises(ReplicaDied):
                    await anext(pieces)
            assert told[2:] == [Work(3, 1)]  # as far as it was told before
            engine.go_on.set()
            await pool.complete("3", ONE, told.append)
            assert told[3:] == [Work(3, 4)]

    run(test())


def test_a_replica_that_dies_is_replaced_by_another() -> None:
    async def test() -> None:
        directory, dying, next_one = Directory(), ScriptedEngine(), ScriptedEngine()
        async with gateway(directory) as (replica_server, pool):
            ReplicaWorker(dying, NAME, 4, directory.find)
            whole = asyncio.ensure_future(pool.complete("whole", ONE))
            stream = pool.stream("stream", ONE)
            assert (await anext(stream)).text == "first"
            await until(lambda: len(dying.begun) == 2)
            (connection,) = replica_server._replicas
            assert connection._transport is not None
            connection._transport.abort()
            with pytest.raises(ReplicaDied, match="died before it had answered"):
                await anext(stream)  # its client has a part of the answer
            await until(lambda: len(dying.ended) == 2)
            next_one.go_on.set()
            dying.go_on.set()
            ReplicaWorker(next_one, NAME, 4, directory.find)
            assert (await whole).text == "whole"  # by whichever called first

    run(test())


def test_a_request_over_which_two_replicas_died_is_refused() -> None:
    """Whole or streamed; others are answered by the next."""

    async def test() -> None:
        directory = Directory()
        async with gateway(directory) as (replica_server, pool):

            async def die(call: asyncio.Future[Any]) -> None:
                engine = ScriptedEngine()
                worker = ReplicaWorker(engine, NAME, 4, directory.find)
                await until(lambda: bool(engine.begun))
                worker._following.cancel()
                for connecting in worker._connecting.values():
                    connecting.cancel()
                (connection,) = replica_server._replicas
                assert connection._transport is not None
                connection._transport.abort()
                await until(lambda: not replica_server._replicas or call.done())

            deadly = asyncio.ensure_future(pool.complete("deadly", ONE))
            await die(deadly)
            await die(deadly)
            with pytest.raises(ReplicaDied):
                await deadly
            for again in (pool.complete("deadly", ONE), pool.complete("deadly", ONE)):
                with pytest.raises(
                    InputError, match=r"2 replicas ended while they answered this request \([0-9a-f]{16}\)"
                ):
                    await again
            survivor = ScriptedEngine()
            survivor.go_on.set()
            ReplicaWorker(survivor, NAME, 4, directory.find)
            assert (await pool.complete("harmless", ONE)).text == "harmless"

    run(test())


def test_deaths_are_forgotten_in_time() -> None:
    now_s = [0.0]
    deadly, request = DeadlyRequests(lambda: now_s[0]), rpc.Complete("x", ONE)
    for replica in (7, 7, 8):  # of which the first had two of it
        deadly.refuse(request)
        deadly.on_death(request, replica)
    with pytest.raises(InputError, match="replicas ended"):
        deadly.refuse(request)
    deadly.refuse(rpc.Complete("y", ONE))
    now_s[0] = DEATHS_COUNT_S
    deadly.refuse(request)


def test_a_draining_replica_finishes_its_requests_and_gets_no_more() -> None:
    async def test() -> None:
        directory, leaving, staying = Directory(), ScriptedEngine(), ScriptedEngine()
        async with gateway(directory) as (_, pool):
            worker = ReplicaWorker(leaving, NAME, 2, directory.find)
            stream = pool.stream("long", ONE)
            assert (await anext(stream)).text == "first"
            left = asyncio.ensure_future(worker.drain())
            await until(lambda: pool.load.replicas == 0)
            waits = asyncio.ensure_future(pool.complete("next", ONE))
            ReplicaWorker(staying, NAME, 2, directory.find)
            await until(lambda: staying.begun == ["next"])
            assert not left.done()
            leaving.go_on.set()
            assert [piece.text async for piece in stream] == ["last"]
            await asyncio.wait_for(left, SOON_S)
            staying.go_on.set()
            assert (await waits).text == "next"
            assert leaving.begun == ["long"]

    run(test())


def test_gateways_share_the_capacity_of_a_replica_in_the_order_of_their_requests() -> None:
    async def test() -> None:
        directory, engine = Directory(), ScriptedEngine()
        async with gateway(directory) as (first, one), gateway(directory) as (second, two):
            addresses = [await each.listen(HOST) for each in (first, second)]
            await directory.publish(*addresses)
            worker = ReplicaWorker(engine, NAME, 2, directory.find)
            await until(lambda: one.load.replicas == two.load.replicas == 1)
            calls = []
            for number, pool in enumerate((one, one, two, two)):
                calls.append(asyncio.ensure_future(pool.complete(str(number), ONE)))
                await until(lambda: len(worker._tasks) == len(calls))
            assert (one.load, two.load, engine.begun) == (ReplicaLoad(1, 2, 0), ReplicaLoad(1, 2, 0), ["0", "1"])
            calls[1].cancel()
            await until(lambda: engine.begun == ["0", "1", "2"])
            engine.go_on.set()
            assert [(await each).text for each in (calls[0], *calls[2:])] == ["0", "2", "3"]
            await directory.publish(addresses[0])  # the second one is lost
            second.close()
            await until(lambda: worker._connecting.keys() == {addresses[0]})
            assert (await one.complete("4", ONE)).text == "4"

    run(test())


def test_a_replaced_gateway_finishes_its_streams_while_replicas_connect_to_the_next() -> None:
    async def test() -> None:
        directory, engine = Directory(), ScriptedEngine()
        async with gateway(directory) as (old, before):
            ReplicaWorker(engine, NAME, 2, directory.find)
            stream = before.stream("old", ONE)
            assert (await anext(stream)).text == "first"
            async with gateway(directory) as (_, after):
                calls = asyncio.ensure_future(after.complete("new", ONE))
                await until(lambda: engine.begun == ["old", "new"])
                engine.go_on.set()
                assert [piece.text async for piece in stream] == ["last"]
                assert (await calls).text == "new"
                old.close()
                await until(lambda: before.load.replicas == 0)
                assert (await after.complete("newer", ONE)).text == "newer"

    run(test())


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        (MAX_HELLO_BYTES + 1).to_bytes(LENGTH_BYTES, "big"),
        (3).to_bytes(LENGTH_BYTES, "big") + b"\xc1\xc1\xc1",
        encode_frame(Hello("wrong", "package", 1)),  # not the gateway's secret
        encode_frame(Drain()),  # before a Hello
    ],
)
def test_a_connection_that_does_not_authenticate_is_closed(sent: bytes) -> None:
    async def test() -> None:
        replica_server = ReplicaServer()
        address = await replica_server.listen(HOST)
        with socket.create_connection((address.host, address.port), timeout=SOON_S) as stranger:
            stranger.sendall(sent)
            assert await asyncio.to_thread(gone, stranger)
        assert replica_server.loads == {}
        replica_server.close()

    def gone(stranger: socket.socket) -> bool:
        try:
            return stranger.recv(1) == b""
        except ConnectionResetError:
            return True

    run(test())


def test_rows_that_wait_share_a_batch() -> None:
    class Slow:
        """Notes the size of every batch."""

        width = 4

        def __init__(self) -> None:
            self.sizes: list[int] = []

        def logprobs(self, inputs_BD: NDArray[np.float32]) -> NDArray[np.float32]:
            self.sizes.append(len(inputs_BD))
            if inputs_BD.max() > 1:
                raise RuntimeError("too bright")
            return inputs_BD * 2

        def check(self) -> None:
            """It answers."""

        def close(self) -> None:
            """Nothing to free."""

    async def test() -> None:
        engine = Slow()
        batching: AsyncEngine = BatchingEngine(engine)
        images = [np.full((1, 4), i / 64, np.float32) for i in range(40)]
        found = await asyncio.gather(*(batching.logprobs(image) for image in images))
        assert engine.sizes == [16, 16, 8]
        for image, twice in zip(images, found, strict=True):
            np.testing.assert_array_equal(twice, image * 2)
        bright = np.full((1, 4), 2, np.float32)
        failed = await asyncio.gather(batching.logprobs(bright), batching.logprobs(images[0]), return_exceptions=True)
        assert [str(each) for each in failed] == ["too bright", "too bright"]
        np.testing.assert_array_equal(await batching.logprobs(images[1]), images[1] * 2)

    run(test())
