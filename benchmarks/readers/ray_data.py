"""Readers under Ray Data, two consumers, on a cluster of their own: ray_data.py VARIANT ROOT BATCH_SIZE EPOCHS.

CPU seconds are those of every process of the cluster: `later` from the first batch on, `first` with what was
needed to come there, a start that a longer run pays once.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.data import DataContext, DataIterator, Dataset

sys.path.insert(0, str(Path(__file__).parents[1]))
from measuring import TreeCpu

from overproof.data.feed import planned_dataset
from overproof.data.manifest import Manifest
from overproof.data.order import Order
from overproof.data.parquet_reader import table_to_numpy
from overproof.models.hf_directory import to_tensors

CONSUMERS = 2
CPUS = 4  # logical, as the product starts its own local cluster
SEED = 1
BUFFER_ROWS = 1000
NAMES = ("tokens", "length")


@ray.remote(num_cpus=0)
class Consumer:
    def ready(self) -> None:
        """Answer when the process is up."""

    def first(self, variant: str, shard: DataIterator, share: int) -> int:
        """Take the first batch; gives its rows."""
        self.batches = BATCHES[variant](shard, share)
        return len(next(self.batches)["tokens"])

    def rest(self) -> int:
        """Take the others."""
        return sum(len(batch["tokens"]) for batch in self.batches)


def planned_batches(shard: DataIterator, share: int) -> Iterator[dict[str, Any]]:
    tables = shard.iter_batches(batch_size=share, batch_format="pyarrow", prefetch_batches=2)
    for columns in map(table_to_numpy, tables):
        yield to_tensors({name: columns[name] for name in NAMES})


def stock_batches(shard: DataIterator, share: int) -> Iterator[dict[str, Any]]:
    batches = shard.iter_torch_batches(batch_size=share, drop_last=True, local_shuffle_buffer_size=BUFFER_ROWS)
    for batch in batches:
        yield {name: batch[name].long() for name in NAMES}


def planned(root: Path, batch_size: int, epochs: int) -> Dataset:
    manifest = Manifest.read(root)
    order = Order(manifest.groups, manifest.rows_per_group, SEED)
    return planned_dataset(root, order, batch_size, 0, epochs * (order.rows // batch_size), CONSUMERS)


def stock(root: Path, batch_size: int, epochs: int) -> Dataset:  # noqa: ARG001
    return ray.data.read_parquet(str(root / "lists"), shuffle="files").select_columns(list(NAMES))


DATASETS = {"ray_planned": planned, "ray_stock": stock}
BATCHES = {"ray_planned": planned_batches, "ray_stock": stock_batches}


def main(variant: str, root: Path, batch_size: int, epochs: int) -> None:
    ray.init(
        address="local", num_cpus=CPUS, include_dashboard=False, log_to_driver=False, object_store_memory=512 << 20
    )
    DataContext.get_current().enable_progress_bars = False
    consumers: list[Any] = [Consumer.remote() for _ in range(CONSUMERS)]  # type: ignore[attr-defined]
    ray.get([each.ready.remote() for each in consumers])
    again = 1 if variant == "ray_planned" else epochs  # the plan holds every epoch
    share, process = batch_size // CONSUMERS, psutil.Process()
    rows, first_rows, cpu_s, wall_s, start_cpu_s, start_wall_s = 0, 0, 0.0, 0.0, 0.0, 0.0
    for round_ in range(again):
        began = time.perf_counter()
        with TreeCpu(process) as start:
            splits = DATASETS[variant](root, batch_size, epochs).streaming_split(CONSUMERS, equal=True)
            pairs = zip(consumers, splits, strict=True)
            first_rows += sum(ray.get([each.first.remote(variant, split, share) for each, split in pairs]))
        first_s, began = time.perf_counter() - began, time.perf_counter()
        with TreeCpu(process) as rest:
            rows += sum(ray.get([each.rest.remote() for each in consumers]))
        cpu_s, wall_s = cpu_s + rest.seconds, wall_s + time.perf_counter() - began
        if round_ == 0:
            start_cpu_s, start_wall_s = start.seconds, first_s
    found = {"rows": rows, "first_cpu_s": start_cpu_s + cpu_s, "first_wall_s": start_wall_s + wall_s}
    print(json.dumps({**found, "later_cpu_s": cpu_s, "later_wall_s": wall_s, "first_batch_s": start_wall_s}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:5]))
