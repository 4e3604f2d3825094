"""Where a training process begins: with its first rows, and only then with what it trains with."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
import ray.train

from overproof.artifact import Artifact, Draft
from overproof.data.manifest import Manifest
from overproof.data.plan import Order
from overproof.data.read import Columns, to_numpy
from overproof.progress import Progress
from overproof.recipe import Train

PREFETCHED_BATCHES = 2


@dataclass(frozen=True)
class Job:
    """What every worker is given."""

    train: Train
    seed: int
    prepared: Artifact
    draft: Draft
    progress: Progress


def work(job: Job) -> dict[str, Any] | None:
    """Train as one rank; rank 0 writes the artifact and returns the stage's metrics."""
    began = time.monotonic()
    place = ray.train.get_context()
    rank, world = place.get_world_rank(), place.get_world_size()
    arriving = planned_rows(job, rank, world)
    head, first_batch_s = list(islice(arriving, 1)), time.monotonic() - began
    from overproof.train.rank import Trainee  # seconds of imports, for which the readers would want the same cores

    trainee = Trainee(job, rank, world)
    metrics = trainee.fit(chain(head, arriving))
    return None if metrics is None else {"first_batch_s": first_batch_s, **metrics}


def planned_rows(job: Job, rank: int, world: int) -> Iterator[Columns]:
    """This rank's rows of every step, as Ray Data delivers them; they must be the planned ones."""
    if job.train.steps == 0:
        return
    manifest = Manifest.read(job.prepared.local())
    order = Order(manifest.groups, manifest.rows_per_group, job.seed)
    tables = ray.train.get_dataset_shard("train").iter_batches(
        batch_size=job.train.batch_size // world, batch_format="pyarrow", prefetch_batches=PREFETCHED_BATCHES
    )
    for step, columns in enumerate(map(to_numpy, tables)):
        planned = order.step_rows(step, job.train.batch_size, rank, world)
        if not np.array_equal(columns["sample_id"], planned):
            raise RuntimeError(f"step {step}, rank {rank}: rows {columns['sample_id']} came, {planned} were planned")
        yield columns
