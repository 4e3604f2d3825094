"""Planned rows into training workers: a Ray Data source whose blocks come in the order of ``Order``.

Block k goes to rank k mod world, whatever the number of CPUs, when the split is equal and the order is preserved.
A block holds one rank's rows of several steps, so a rank cuts its stream into batches of batch_size / world rows:

    rows = planned_dataset(prepared, order, batch_size, first_step, last_step, world)
    splits = rows.streaming_split(world, equal=True)
    for table in splits[rank].iter_batches(batch_size=batch_size // world, batch_format="pyarrow"):
        columns = to_numpy(table)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import pyarrow as pa
import ray
from ray.data import Dataset, Datasource, ReadTask
from ray.data.block import BlockMetadata

from overproof.data.columns import row_bytes
from overproof.data.manifest import Manifest
from overproof.data.order import Order
from overproof.data.parquet_reader import Shards, planned_columns, planned_shards
from overproof.data.parquet_writer import to_table
from overproof.data.row_files import Source

BLOCK_BYTES = 1 << 20  # at most, small, so that the first batch comes soon and little is read ahead
BLOCK_STEPS = 64  # at most
CONCURRENT_READS = 2  # each starts a process, and the first batch waits for them


@dataclass(frozen=True)
class PlannedBlock:
    """One rank's rows of the steps ``[first, last)``, step after step."""

    rank: int
    first: int
    last: int


@dataclass(frozen=True)
class FeedPlan:
    """Which rows each block of a run holds: all that a reader process is sent."""

    prepared: ray.ObjectRef[Source]  # of thousands of shards: sent to a process once, and not with each block
    order: Order
    batch_size: int
    world: int

    def read(self, block: PlannedBlock) -> Iterator[pa.Table]:
        """The rows of one block."""
        shards = _planned_shards(self.prepared)
        ids = self.order.steps_rows(block.first, block.last, self.batch_size, block.rank, self.world)
        yield to_table(shards.take(ids), shards.schema)


@lru_cache(maxsize=2)
def _planned_shards(prepared: ray.ObjectRef[Source]) -> Shards:
    """Open in this process: each reader fetches what it reads, wherever it runs."""
    return planned_shards(ray.get(prepared))


class PlannedDatasource(Datasource):
    """Blocks of equal size for each rank in turn."""

    def __init__(self, plan: FeedPlan, blocks: list[PlannedBlock], row_bytes: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.plan, self.blocks, self.row_bytes = plan, blocks, row_bytes

    def get_name(self) -> str:
        return "Planned"

    def estimate_inmemory_data_size(self) -> int:
        return sum(self._row_count(block) for block in self.blocks) * self.row_bytes

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """One task for a block, whatever parallelism Ray proposes: the plan fixes the number of blocks."""
        del parallelism, data_context
        return [
            ReadTask(
                partial(self.plan.read, block),
                BlockMetadata(self._row_count(block), self._row_count(block) * self.row_bytes, None, None),
                per_task_row_limit=per_task_row_limit,
            )
            for block in self.blocks
        ]

    def _row_count(self, block: PlannedBlock) -> int:
        return (block.last - block.first) * self.plan.batch_size // self.plan.world


def planned_dataset(
    prepared: Source, order: Order, batch_size: int, first_step: int, last_step: int, world: int
) -> Dataset:
    """The rows of the steps ``[first_step, last_step)``, counted from 0, for ``world`` ranks.

    Split it with ``streaming_split(world, equal=True)``; under Ray Train, give ``DataConfig`` execution options
    that preserve the order, since it sets its own.
    """
    manifest = Manifest.read(prepared)
    if batch_size % world:
        raise ValueError(f"batch_size {batch_size} is not a multiple of {world} ranks")
    if first_step >= last_step:
        raise ValueError(f"steps [{first_step}, {last_step}): expected at least one")
    size_bytes = row_bytes(pa.schema([manifest.schema.field(name) for name in planned_columns(manifest)]))
    steps_per_block = min(max(BLOCK_BYTES // (size_bytes * batch_size // world), 1), BLOCK_STEPS)
    blocks = [
        PlannedBlock(rank, first, min(first + steps_per_block, last_step))
        for first in range(first_step, last_step, steps_per_block)
        for rank in range(world)
    ]
    source = PlannedDatasource(FeedPlan(ray.put(prepared), order, batch_size, world), blocks, size_bytes)
    dataset: Dataset = ray.data.read_datasource(
        source, override_num_blocks=len(blocks), concurrency=min(CONCURRENT_READS, len(blocks))
    )
    dataset.context.execution_options.preserve_order = True
    return dataset
