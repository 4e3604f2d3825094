"""One pool of teachers for all trials of a sweep: a broker that batches their requests, and replicas that answer."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from overproof.artifacts import Artifact
from overproof.config import OnPolicy, Recipe
from overproof.data.parquet_reader import Columns
from overproof.distill.row_cache import TEACHER_WEIGHTS

FOREVER: dict[str, Any] = {"max_restarts": -1, "max_task_retries": -1}  # answers are functions of what is asked


@dataclass(frozen=True)
class ScorerPool:
    """What a trial asks; named, so that it fits into a trial's job."""

    name: str

    def judge(self, tokens_BS: NDArray[np.int64]) -> Columns:
        """Of every generated token, by the teacher: see ``on_policy.Asked``."""
        return self._call("judge", tokens_BS)  # type: ignore[no-any-return]

    def counts(self) -> dict[str, int]:
        """Requests answered, and batches that answered them."""
        return self._call("counts")  # type: ignore[no-any-return]

    def _call(self, method: str, *given: Any) -> Any:
        broker: Any = ray.get_actor(self.name)
        return ray.get(getattr(broker, method).remote(*given))


class ScorerWorker:
    """A judge in its actor; the model code is imported there."""

    def __init__(self, trained: Artifact, settings: OnPolicy, temperatures: tuple[float, ...]) -> None:
        from overproof.distill.on_policy import TeacherScorer

        folder = trained.local() / Path(TEACHER_WEIGHTS).parent
        self.of = TeacherScorer(folder, settings, temperatures, max(1, int(settings.cpus_per_actor)))

    def judge(self, tokens_BS: NDArray[np.int64]) -> Columns:
        return self.of.judge(tokens_BS)


class Batcher:
    """Puts requests of several trials together until they fill a forward pass, or one has waited long enough."""

    def __init__(self, replicas: Sequence[Any], rows: int, wait_s: float) -> None:
        self.rows, self.wait_s = rows, wait_s
        self.waiting: list[tuple[NDArray[np.int64], asyncio.Future[Columns]]] = []
        self.requests = self.batches = 0
        self.idle: asyncio.Queue[Any] = asyncio.Queue()
        for replica in replicas:
            self.idle.put_nowait(replica)
        self.timer: asyncio.TimerHandle | None = None
        self.tasks: set[asyncio.Task[None]] = set()

    async def judge(self, tokens_BS: NDArray[np.int64]) -> Columns:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Columns] = loop.create_future()
        self.waiting.append((tokens_BS, future))
        if sum(len(tokens) for tokens, _ in self.waiting) >= self.rows:
            self._leave()
        elif self.timer is None:
            self.timer = loop.call_later(self.wait_s, self._leave)
        return await future

    async def counts(self) -> dict[str, int]:
        return {"requests": self.requests, "batches": self.batches}

    def _leave(self) -> None:
        if self.timer:
            self.timer.cancel()
        batch, self.waiting, self.timer = self.waiting, [], None
        task = asyncio.get_running_loop().create_task(self._answer(batch))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _answer(self, batch: list[tuple[NDArray[np.int64], asyncio.Future[Columns]]]) -> None:
        replica = await self.idle.get()
        try:
            answer = await replica.judge.remote(np.concatenate([tokens for tokens, _ in batch]))
        except Exception as error:  # each who asked is told
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
            return
        finally:
            self.idle.put_nowait(replica)
        self.requests, self.batches = self.requests + len(batch), self.batches + 1
        start = 0
        for tokens, future in batch:
            if not future.done():  # or who asked is dead
                future.set_result({name: values[start : start + len(tokens)] for name, values in answer.items()})
            start += len(tokens)


@contextmanager
def scorer_pool(recipe: Recipe, trained: Artifact) -> Iterator[ScorerPool | None]:
    """The pool, where a student of the sweep asks for one; it ends with the block."""
    settings = recipe.sweep.judged
    if settings is None:
        yield None
        return
    resources = {"num_cpus": settings.cpus_per_actor, "num_gpus": settings.gpus_per_actor}
    replica: Any = ray.remote(ScorerWorker)
    replicas = [
        replica.options(**resources, **FOREVER).remote(trained, settings, recipe.judged_temperatures)
        for _ in range(settings.actors)
    ]
    name = f"teachers-{secrets.token_hex(8)}"
    broker: Any = ray.remote(Batcher)
    leader = broker.options(name=name, num_cpus=0, **FOREVER).remote(replicas, settings.rows, settings.wait_s)
    try:
        yield ScorerPool(name)
    finally:
        for actor in (leader, *replicas):
            ray.kill(actor)
