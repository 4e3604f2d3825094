"""Readers in the product's environment: its own, and torch's DataLoader over pyarrow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from timing import Batches, Epoch, main
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset

from overproof.data.manifest import Manifest
from overproof.data.order import Order
from overproof.data.parquet_reader import Shards, table_to_numpy
from overproof.models.hf_directory import to_tensors

COLUMNS = ["tokens", "length"]
SEED = 1
GROUPS_IN_BUFFER = 8


def planned(root: Path) -> Order:
    manifest = Manifest.read(root)
    return Order(manifest.groups, manifest.rows_per_group, SEED)


def ours_step_by_step(root: Path, batch_size: int) -> Epoch:
    order, shards = planned(root), Shards(root, "train")
    steps = order.rows // batch_size

    def epoch(index: int) -> Batches:
        for step in range(index * steps, (index + 1) * steps):
            batch = to_tensors(shards.take(order.step_rows(step, batch_size)))
            yield batch["tokens"], batch["length"]

    return epoch


def ours(root: Path, batch_size: int) -> Epoch:
    order, shards = planned(root), Shards(root, "train")
    steps = order.rows // batch_size

    def epoch(index: int) -> Batches:
        for batch in map(to_tensors, shards.steps(order, batch_size, index * steps, (index + 1) * steps)):
            yield batch["tokens"], batch["length"]

    return epoch


def to_arrays(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    columns = table_to_numpy(table)
    return columns["tokens"], columns["length"]


def files(root: Path) -> list[Path]:
    return sorted((root / "train").glob("*.parquet"))


class InMemory(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """The whole table in memory; a batch is taken at once."""

    def __init__(self, root: Path) -> None:
        parts = [pq.read_table(file, columns=COLUMNS, use_threads=False) for file in files(root)]
        self.table = pa.concat_tables(parts).combine_chunks()

    def __len__(self) -> int:
        return len(self.table)

    def __getitems__(self, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, length = to_arrays(self.table.take(pa.array(ids)))
        return torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(length.astype(np.int64))


def torch_map(root: Path, batch_size: int) -> Epoch:
    """The planned permutation, by a sampler over all row ids."""
    order = planned(root)
    kept: list[InMemory] = []

    def epoch(index: int) -> Batches:
        if not kept:
            kept.append(InMemory(root))  # so that the first epoch reads the files
        ids = order.rows_at(index * order.rows, (index + 1) * order.rows).tolist()
        sampler = BatchSampler(ids, batch_size, drop_last=True)
        yield from DataLoader(kept[0], batch_sampler=sampler, collate_fn=lambda batch: batch)

    return epoch


class RowGroups(IterableDataset[tuple[torch.Tensor, torch.Tensor]]):
    """Row groups in random order, some in a buffer, whose rows are mixed."""

    def __init__(self, root: Path, epoch: int, batch_size: int | None) -> None:
        self.files = [pq.ParquetFile(file) for file in files(root)]
        self.epoch, self.batch_size = epoch, batch_size

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        rng = np.random.default_rng([SEED, self.epoch])
        places = [(file, group) for file in self.files for group in range(file.num_row_groups)]
        mixed = [places[index] for index in rng.permutation(len(places))]
        left = [np.empty((0, 1), np.int64), np.empty(0, np.int64)]
        for start in range(0, len(mixed), GROUPS_IN_BUFFER):
            groups = mixed[start : start + GROUPS_IN_BUFFER]
            table = pa.concat_tables(f.read_row_group(g, columns=COLUMNS, use_threads=False) for f, g in groups)
            columns = [values.astype(np.int64) for values in to_arrays(table)]
            chosen = rng.permutation(len(columns[1]))
            columns = [values[chosen] for values in columns]
            if self.batch_size is None:
                yield from zip(*map(torch.from_numpy, columns), strict=True)
                continue
            columns = [np.concatenate(pair) if len(pair[0]) else pair[1] for pair in zip(left, columns, strict=True)]
            whole = len(columns[1]) // self.batch_size * self.batch_size
            for at in range(0, whole, self.batch_size):
                tokens, length = (torch.from_numpy(values[at : at + self.batch_size]) for values in columns)
                yield tokens, length
            left = [values[whole:] for values in columns]


def torch_rows(root: Path, batch_size: int) -> Epoch:
    return lambda index: iter(DataLoader(RowGroups(root, index, None), batch_size=batch_size, drop_last=True))


def torch_batches(root: Path, batch_size: int) -> Epoch:
    return lambda index: iter(DataLoader(RowGroups(root, index, batch_size), batch_size=None))


if __name__ == "__main__":
    main({
        "ours": ours,
        "ours_step_by_step": ours_step_by_step,
        "torch_map": torch_map,
        "torch_rows": torch_rows,
        "torch_batches": torch_batches,
    })  # fmt: skip
