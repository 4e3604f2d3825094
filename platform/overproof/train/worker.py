"""Where a training process begins: with its first rows, and only then with what it trains with."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

import numpy as np
import ray.train
from ray.data import DataIterator
from ray.train.collective import broadcast_from_rank_zero

from overproof.data.ingest import planned_dataset
from overproof.data.manifest import Manifest
from overproof.data.plan import Order
from overproof.data.read import Columns, to_numpy
from overproof.train.elastic import WorkerBell, say
from overproof.train.job import Job
from overproof.train.start import Start

PREFETCHED_BATCHES = 2


def work(job: Job) -> dict[str, Any] | None:
    """Train as one rank from the newest checkpoint; rank 0 writes the artifact and returns the stage's metrics."""
    began = time.monotonic()
    place = ray.train.get_context()
    rank, world = place.get_world_rank(), place.get_world_size()
    start, feeds = broadcast_from_rank_zero(begin(job, world) if rank == 0 else None)
    arriving = planned_rows(job, start.step, feeds[rank], rank, world)
    head, first_batch_s = list(islice(arriving, 1)), time.monotonic() - began
    from overproof.train.rank import Trainee  # seconds of imports, for which the readers would want the same cores

    trainee = Trainee(job, start, rank, world)
    metrics = trainee.fit(chain(head, arriving), WorkerBell())
    return None if metrics is None else {"first_batch_s": first_batch_s, **metrics}


def begin(job: Job, world: int) -> tuple[Start, list[DataIterator | None]]:
    """Rank 0 chooses the checkpoint, and opens the stream of the rows that follow it: one part for each rank.

    The stream belongs to rank 0's process and ends with it, so that no reader outlives its group of workers.

    Raises:
        InputError: there should be a checkpoint, and none is good.
    """
    start = Start(job.checkpoints.newest(lambda line: say(job, line)))
    if start.step >= job.train.steps:
        return start, [None] * world
    root = job.prepared.local()
    rows = planned_dataset(root, order_of(job), job.train.batch_size, start.step, job.train.steps, world)
    return start, list(rows.streaming_split(world, equal=True))


def order_of(job: Job) -> Order:
    """The order of the rows, the same at every start."""
    manifest = Manifest.read(job.prepared.local())
    return Order(manifest.groups, manifest.rows_per_group, job.seed)


def planned_rows(job: Job, first: int, feed: DataIterator | None, rank: int, world: int) -> Iterator[Columns]:
    """This rank's rows of every step from ``first`` on, as Ray Data delivers them; they must be the planned ones."""
    if feed is None:
        return
    order = order_of(job)
    tables = feed.iter_batches(
        batch_size=job.train.batch_size // world, batch_format="pyarrow", prefetch_batches=PREFETCHED_BATCHES
    )
    for step, columns in enumerate(map(to_numpy, tables), first):
        planned = order.step_rows(step, job.train.batch_size, rank, world)
        if not np.array_equal(columns["sample_id"], planned):
            raise RuntimeError(f"step {step}, rank {rank}: rows {columns['sample_id']} came, {planned} were planned")
        yield columns
