"""Teachers in Ray actors, in two kinds of pool.

``capture`` runs one under Ray Data, which writes one file for each train shard: the cache, or text of their own.
``scorer_pool`` keeps one for all trials of a sweep: a broker batches their requests, and workers answer them.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import RayTaskError

from overproof.artifacts import Artifact
from overproof.config import OnPolicy, Recipe
from overproof.data.manifest import Manifest
from overproof.data.parquet_reader import Columns
from overproof.distill.row_cache import teacher_folder
from overproof.errors import InputError
from overproof.files import FileEntry, filesystem, mismatched_files
from overproof.stage_context import Notice, StageContext, TaskProgress
from overproof.train.checkpoint import Damage, read_checksummed
from overproof.units import format_count

if TYPE_CHECKING:
    from overproof.distill.teacher_worker import CaptureJob, TeacherWorker  # which import transformers

RESTART_ALWAYS: dict[str, Any] = {"max_restarts": -1, "max_task_retries": -1}  # scores are functions of the tokens


@dataclass(frozen=True)
class CaptureResult:
    """What a capture took, in all attempts."""

    seconds: float  # of the teachers
    size_bytes: int
    actors: int  # of the last attempt


def capture(
    context: StageContext, job: CaptureJob, worker: type[TeacherWorker], units_per_row: int, unit: str
) -> CaptureResult:
    """Write the files of the job's index, and the index; ``unit`` is what the rate beside the bar counts.

    Files that an attempt which was killed has finished are still in the draft, under their names.

    Raises:
        InputError: what a teacher could not do.
    """
    index, finished = job.index, finished_files(job)
    task, rows_per_group = index.STAGE, index.identity.rows_per_group
    todo = [number for number, file in enumerate(index.files) if file.path not in finished]
    actors = min(job.settings.actors, len(todo))
    written = {path: file.entry for path, file in finished.items()}
    seconds = sum(file.seconds for file in finished.values())
    done = sum(len(file.groups) for file in index.files if file.path in finished) * rows_per_group
    if finished:
        context.progress(Notice(f"{len(finished)} of {format_count(len(index.files), 'file')} were captured before"))
    context.progress(TaskProgress(task, done, index.rows, f"starting {actors} teachers"))
    for report in _reports(job, worker, todo, actors) if todo else ():
        done, seconds = done + report["rows"], seconds + report["seconds"]
        if report["path"]:
            written[report["path"]] = FileEntry(sha256=report["sha256"], size_bytes=report["size_bytes"])
        rate = done * units_per_row / max(seconds, 1e-9) * actors
        context.progress(TaskProgress(task, done, index.rows, f"{rate:,.0f} {unit}/s"))
    write_index(job, written)
    return CaptureResult(seconds, sum(entry.size_bytes for entry in written.values()), actors)


@dataclass(frozen=True)
class FinishedFile:
    """A file that is complete, as its mark has it."""

    entry: FileEntry
    seconds: float  # of the teacher


def finished_files(job: CaptureJob) -> dict[str, FinishedFile]:
    """The complete files in the draft, by name; each is hashed."""
    store, root = filesystem(job.draft.uri)
    marks, found = filesystem(job.draft.marks)[1], {}
    for file in job.index.files:
        record = read_checksummed(store, f"{marks}/{file.path}.json")
        if not isinstance(record, Damage):
            found[file.path] = FinishedFile(FileEntry(**record["entry"]), record["seconds"])
    damaged = {path for path, _ in mismatched_files(store, root, {path: file.entry for path, file in found.items()})}
    return {path: file for path, file in found.items() if path not in damaged}


def write_index(job: CaptureJob, written: Mapping[str, FileEntry]) -> None:
    """Hand in the files that the index lists, write it beside them, and leave nothing else there."""
    job.draft.clear()  # what an actor that was killed has begun
    job.draft.hand_in(written)
    job.draft.write(job.index.FILE, job.index.model_dump_json(indent=1).encode())


def _reports(job: CaptureJob, worker: type[TeacherWorker], todo: list[int], actors: int) -> Iterator[dict[str, Any]]:
    """Run the pool over the files with these numbers; yields what each part and each file reports meanwhile."""
    import ray.data  # seconds to import, and not needed by trials that ask a scorer

    with _streaming():
        items = [{"file": number} for number in todo]
        reports = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            worker,
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=actors),
            fn_constructor_args=(job,),
            num_cpus=job.settings.cpus_per_actor,
            num_gpus=job.settings.gpus_per_actor,
        )
        for report in reports.iter_rows():
            if report["fault"]:
                raise InputError(report["fault"])
            yield report


@contextmanager
def _streaming() -> Iterator[None]:
    """Every report leaves its actor at once, and Ray Data draws and logs nothing of its own."""
    import ray.data

    settings, logger = ray.data.DataContext.get_current().copy(), logging.getLogger("ray.data")
    settings.enable_progress_bars = False
    settings.print_on_execution_start = False
    settings.target_max_block_size = 1  # bytes
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with ray.data.DataContext.current(settings):
            yield
    finally:
        logger.setLevel(level)


@dataclass(frozen=True)
class ScorerPool:
    """An ``on_policy.Scorer`` for any process of the cluster: the broker's name, so that it fits into a trial's job."""

    name: str

    def score(self, tokens_BS: NDArray[np.int64]) -> Columns:
        return self._call("score", tokens_BS)  # type: ignore[no-any-return]

    def counts(self) -> dict[str, int]:
        """Requests answered, and batches that answered them."""
        return self._call("counts")  # type: ignore[no-any-return]

    def _call(self, method: str, *arguments: Any) -> Any:
        broker: Any = ray.get_actor(self.name)
        try:
            return ray.get(getattr(broker, method).remote(*arguments))
        except RayTaskError as error:  # each actor on the way wraps what it wraps, with a traceback for a message
            cause: BaseException = error
            while isinstance(cause, RayTaskError):
                cause = cause.cause
            if isinstance(cause, InputError):
                raise cause from None
            raise


class ScorerWorker:
    """A ``TeacherScorer`` in its actor; the model code is imported there."""

    def __init__(
        self, trained: Artifact, settings: OnPolicy, temperatures: tuple[float, ...], apart_id: int | None
    ) -> None:
        from overproof.distill.on_policy import TeacherScorer

        folder = teacher_folder(trained)
        threads = max(1, int(settings.cpus_per_actor))
        self.scorer = TeacherScorer(folder, settings, temperatures, threads, apart_id)

    def score(self, tokens_BS: NDArray[np.int64]) -> Columns:
        return self.scorer.score(tokens_BS)


class Batcher:
    """Collects requests of several trials until they fill a forward pass, or one has waited long enough."""

    def __init__(self, workers: Sequence[Any], rows: int, wait_s: float) -> None:
        self.rows, self.wait_s = rows, wait_s
        self.waiting: list[tuple[NDArray[np.int64], asyncio.Future[Columns]]] = []
        self.requests = self.batches = 0
        self.idle_workers: asyncio.Queue[Any] = asyncio.Queue()
        for worker in workers:
            self.idle_workers.put_nowait(worker)
        self.timer: asyncio.TimerHandle | None = None
        self.running: set[asyncio.Task[None]] = set()

    async def score(self, tokens_BS: NDArray[np.int64]) -> Columns:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Columns] = loop.create_future()
        self.waiting.append((tokens_BS, future))
        if sum(len(tokens) for tokens, _ in self.waiting) >= self.rows:
            self._dispatch()
        elif self.timer is None:
            self.timer = loop.call_later(self.wait_s, self._dispatch)
        return await future

    async def counts(self) -> dict[str, int]:
        return {"requests": self.requests, "batches": self.batches}

    def _dispatch(self) -> None:
        if self.timer:
            self.timer.cancel()
        batch, self.waiting, self.timer = self.waiting, [], None
        task = asyncio.get_running_loop().create_task(self._score_batch(batch))
        self.running.add(task)
        task.add_done_callback(self.running.discard)

    async def _score_batch(self, batch: list[tuple[NDArray[np.int64], asyncio.Future[Columns]]]) -> None:
        worker = await self.idle_workers.get()
        try:
            scores = await worker.score.remote(np.concatenate([tokens for tokens, _ in batch]))
        except Exception as error:  # raised by every request of the batch
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
            return
        finally:
            self.idle_workers.put_nowait(worker)
        self.requests, self.batches = self.requests + len(batch), self.batches + 1
        start = 0
        for tokens, future in batch:
            if not future.done():  # it is where the trial that asked has died
                future.set_result({name: values[start : start + len(tokens)] for name, values in scores.items()})
            start += len(tokens)


@contextmanager
def scorer_pool(recipe: Recipe, prepared: Artifact, trained: Artifact) -> Iterator[ScorerPool | None]:
    """The pool, where a student of the sweep needs one; it ends with the block."""
    settings = recipe.sweep.teacher_pool
    if settings is None:
        yield None
        return
    resources = {"num_cpus": settings.cpus_per_actor, "num_gpus": settings.gpus_per_actor}
    remote_worker: Any = ray.remote(ScorerWorker)
    given = trained, settings, recipe.scorer_temperatures, Manifest.read(prepared).apart_id
    workers = [remote_worker.options(**resources, **RESTART_ALWAYS).remote(*given) for _ in range(settings.actors)]
    name = f"teachers-{secrets.token_hex(8)}"
    remote_batcher: Any = ray.remote(Batcher)
    broker = remote_batcher.options(name=name, num_cpus=0, **RESTART_ALWAYS).remote(
        workers, settings.rows, settings.wait_s
    )
    try:
        yield ScorerPool(name)
    finally:
        for actor in (broker, *workers):
            ray.kill(actor)
