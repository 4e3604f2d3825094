"""Where a training process begins: with the first rows, read by itself, while Ray Data has not yet begun to stream."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from itertools import chain, islice
from typing import Any

import numpy as np
import ray.train
from ray.data import DataIterator
from ray.train.collective import broadcast_from_rank_zero

from overproof.data.feed import planned_dataset
from overproof.data.order import Order
from overproof.data.parquet_reader import Columns, planned_shards, table_to_numpy
from overproof.train.ray_elastic import WorkerCheckpointSignal, notify
from overproof.train.train_job import ResumePoint, TrainJob

PREFETCHED_BATCHES = 2
STREAM_STEPS = 8192  # of one stream; the next is opened half-way. Ray Data holds a task for each block of a stream
OWN_STEPS = 16  # whose rows a rank reads by itself: Ray Data starts meanwhile, and its processes want the same cores


def train_rank(job: TrainJob) -> dict[str, Any] | None:
    """Train as one rank from the newest checkpoint; rank 0 writes the artifact and returns the stage's metrics."""
    began = time.monotonic()
    start, rank, world = join_group(job)
    arriving = planned_rows(job, start.step, rank, world)
    head, first_batch_s = list(islice(arriving, 1)), time.monotonic() - began
    from overproof.train.rank_trainer import RankTrainer  # seconds of imports

    trainee = RankTrainer(job, start, rank, world)
    metrics = trainee.fit(chain(head, arriving), WorkerCheckpointSignal())
    return None if metrics is None else {"first_batch_s": first_batch_s, **metrics}


def join_group(job: TrainJob) -> tuple[ResumePoint, int, int]:
    """Where this group begins, as rank 0 found it; this worker's rank and the size of its world."""
    place = ray.train.get_context()
    rank, world = place.get_world_rank(), place.get_world_size()
    found = ResumePoint(job.checkpoints.newest(lambda line: notify(job, line))) if rank == 0 else None
    return broadcast_from_rank_zero(found), rank, world


def planned_rows(job: TrainJob, first: int, rank: int, world: int) -> Iterator[Columns]:
    """This rank's rows of every step from ``first`` on; they must be the planned ones.

    The first ``OWN_STEPS`` are read here, and after the first of them Ray Data is started to bring the others, a stream
    of ``STREAM_STEPS`` at a time.
    """
    steps, batch_size = job.train.steps, job.train.batch_size
    shards = planned_shards(job.prepared.local())
    order = shards.manifest.order(job.seed)
    step, stop = first, min(steps, first + OWN_STEPS)
    tables = shards.steps(order, batch_size, step, stop, rank, world)
    while step < steps:
        following: Future[Iterator[Columns]] = Future()
        for columns in tables:
            planned = order.step_rows(step, batch_size, rank, world)
            if not np.array_equal(columns["sample_id"], planned):
                raise RuntimeError(f"step {step}, rank {rank}: rows {columns['sample_id']}, {planned} were planned")
            yield columns
            if step == max(first, stop - STREAM_STEPS // 2) and stop < steps:
                asked = (following, job, order, stop, min(steps, stop + STREAM_STEPS), rank, world)
                threading.Thread(target=_open, args=asked, name="feed", daemon=True).start()
            step += 1
        if step < steps:
            tables, stop = following.result(), min(steps, stop + STREAM_STEPS)


def _open(opened: Future[Iterator[Columns]], *asked: Any) -> None:
    try:
        opened.set_result(_stream(*asked))
    except BaseException as error:  # surfaces in the thread that trains
        opened.set_exception(error)


def _stream(job: TrainJob, order: Order, first: int, last: int, rank: int, world: int) -> Iterator[Columns]:
    """A rank's rows of the steps ``[first, last)``; those of the first have arrived.

    Rank 0 opens the stream and hands out the parts. It belongs to rank 0's process and ends with it, so that no
    reader outlives its group of workers.
    """
    parts: list[DataIterator] | None = None
    if rank == 0:
        rows = planned_dataset(job.prepared.local(), order, job.train.batch_size, first, last, world)
        parts = list(rows.streaming_split(world, equal=True))
    feed = broadcast_from_rank_zero(parts)[rank]
    tables = iter(
        feed.iter_batches(
            batch_size=job.train.batch_size // world, batch_format="pyarrow", prefetch_batches=PREFETCHED_BATCHES
        )
    )
    return map(table_to_numpy, chain(list(islice(tables, 1)), tables))
