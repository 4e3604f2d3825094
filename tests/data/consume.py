"""Consume planned rows on two ranks of a cluster of its own: consume.py ROOT CPUS BATCH_SIZE FIRST LAST."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import ray
from ray.data import DataIterator

from overproof.data.feed import planned_dataset
from overproof.data.manifest import Manifest
from overproof.data.order import Order
from overproof.data.parquet_reader import table_to_numpy


@ray.remote(num_cpus=0)
class Rank:
    def ready(self) -> None:
        """Answer when the process is up."""

    def consume(self, shard: DataIterator, rows: int) -> tuple[float, list[list[int]], dict[str, list[int]]]:
        """Seconds to the first batch, the rows of every batch, and the shapes of its columns."""
        began, first_s = time.monotonic(), 0.0
        ids: list[list[int]] = []
        shapes: dict[str, list[int]] = {}
        for columns in map(table_to_numpy, shard.iter_batches(batch_size=rows, batch_format="pyarrow")):
            first_s = first_s or time.monotonic() - began
            ids.append(columns["sample_id"].tolist())
            shapes = {name: list(values.shape) for name, values in columns.items()}
        return first_s, ids, shapes


def main(root: Path, cpus: int, batch_size: int, first: int, last: int) -> None:
    ray.init(
        address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, object_store_memory=200 << 20
    )
    manifest = Manifest.read(root)
    order = Order(manifest.groups, manifest.rows_per_group, seed=3)
    ranks: list[Any] = [Rank.remote() for _ in range(2)]  # type: ignore[attr-defined]
    ray.get([rank.ready.remote() for rank in ranks])
    splits = planned_dataset(root, order, batch_size, first, last, 2).streaming_split(2, equal=True)
    done = ray.get([rank.consume.remote(split, batch_size // 2) for rank, split in zip(ranks, splits, strict=True)])
    seconds, rows, shapes = zip(*done, strict=True)
    print(json.dumps({"first_batch_s": max(seconds), "rows": rows, "columns": shapes[0]}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
