"""A prepared text data set of random tokens, as large as a benchmark needs, written as the product writes shards."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa

from overproof.data.manifest import MANIFEST, Manifest, Split, shard_schema
from overproof.data.parquet_reader import Columns
from overproof.data.parquet_writer import parquet_bytes, to_table, write_shard
from overproof.data.token_parts import text_columns
from overproof.data.tokenization import token_columns
from overproof.files import write_file

SHARDS = 4
HELD_OUT_ROWS = 64
LISTS = "lists"  # a folder beside the splits, for readers that do not know the product's columns


def write_rows(root: Path, rows: int, sequence_length: int, rows_per_group: int, vocab_size: int) -> Manifest:
    """Write a train split of at most ``rows`` rows, in whole row groups, and a small validation split.

    Tokens are drawn from a Zipf-like law, so that they compress as text does.
    """
    per_shard = max(1, rows // SHARDS // rows_per_group) * rows_per_group
    chances = 1 / np.arange(2, vocab_size + 2)
    edges = np.cumsum(chances / chances.sum())
    columns = text_columns(sequence_length, vocab_size)
    splits = {}
    for split, sizes in {"train": [per_shard] * SHARDS, "validation": [HELD_OUT_ROWS]}.items():
        shards = []
        for index, size in enumerate(sizes):
            draws = np.random.default_rng([index, split == "train"]).random((size, sequence_length + 1))
            tokens_RS = np.minimum(np.searchsorted(edges, draws), vocab_size - 1).astype(np.int32)
            part = token_columns(index * per_shard, tokens_RS, sequence_length, -1)
            name = f"{split}/{index:05d}.parquet"
            fields, predictions = shard_schema(columns), size * sequence_length
            shards.append(write_shard(str(root), name, part, fields, rows_per_group, predictions))
            if split == "train":
                write_lists(root, index, part, rows_per_group)
        total = sum(sizes)
        splits[split] = Split(shards=tuple(shards), rows=total, predictions=total * sequence_length, documents=1)
    manifest = Manifest(
        task="language_modeling",
        columns=columns,
        splits=splits,
        rows_per_group=rows_per_group,
        positions=sequence_length,
        outputs=vocab_size,
    )
    (root / MANIFEST).write_text(manifest.model_dump_json())
    return manifest


def write_lists(root: Path, index: int, part: Columns, rows_per_group: int) -> None:
    """The same rows as others would keep them: tokens as lists of 32-bit integers."""
    width = part["tokens"].shape[1]
    fields = pa.schema([pa.field("tokens", pa.list_(pa.int32(), width)), pa.field("length", pa.int32())])
    write_file(str(root), f"{LISTS}/{index:05d}.parquet", parquet_bytes(to_table(part, fields), rows_per_group))


if __name__ == "__main__":
    write_rows(Path(sys.argv[1]), *map(int, sys.argv[2:]))
