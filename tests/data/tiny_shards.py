"""A tiny prepared text, written shard by shard."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from overproof.data.manifest import MANIFEST, Manifest, Split, shard_schema
from overproof.data.parquet_writer import write_shard
from overproof.data.token_parts import text_columns

T, GROUP, ROWS, VOCABULARY = 8, 4, (40, 24), 9999


def write_tiny_text(root: Path) -> Path:
    """Two train shards and one that ends in a part of a row group; tokens tell the row."""
    splits, fields = {}, shard_schema(text_columns(T, VOCABULARY))
    for split, sizes in {"train": ROWS, "validation": (6,)}.items():
        shards, start = [], 0
        for index, rows in enumerate(sizes):
            ids = np.arange(start, start + rows)
            columns = {
                "sample_id": ids,
                "document": np.full(rows, -1, np.int32),
                "tokens": (ids[:, None] * 100 + np.arange(T + 1)).astype(np.int32),
                "length": np.full(rows, T, np.int32),
            }
            shards.append(write_shard(str(root), f"{split}/{index:05d}.parquet", columns, fields, GROUP, rows * T))
            start += rows
        splits[split] = Split(shards=tuple(shards), rows=start, predictions=start * T, documents=1)
    manifest = Manifest(
        task="language_modeling", columns=text_columns(T, VOCABULARY), splits=splits, rows_per_group=GROUP,
        positions=T, outputs=VOCABULARY, tokenizer_sha256="0" * 64,
    )  # fmt: skip
    (root / MANIFEST).write_text(manifest.model_dump_json())
    return root
