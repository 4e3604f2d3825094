"""Tiny prepared data sets and models, made in a moment and the same every time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from overproof.config import Train
from overproof.data.manifest import MANIFEST, TOKENIZER, Column, Manifest, Split, shard_schema
from overproof.data.parquet_reader import Columns
from overproof.data.parquet_writer import write_shard
from overproof.data.token_parts import text_columns
from overproof.models.llama import Llama
from overproof.models.vit import Vit

ROWS = {"train": 96, "validation": 23, "test": 8}
ROWS_PER_GROUP = 8
CLASSES = 4
VOCABULARY = 64
LENGTH = 12
PIXELS = (Column(name="pixels", dtype="<f4", shape=(1, 8, 8)), Column(name="label", dtype="<i4"))
TOKENS = text_columns(LENGTH, VOCABULARY)

VIT = Vit(hidden_size=16, intermediate_size=32, layers=1, heads=2, patch_size=4)
LLAMA = Llama(hidden_size=32, intermediate_size=64, layers=2, heads=4, kv_heads=2)


def digits_like(root: Path, broken_row: int | None = None) -> Path:
    """Noisy bars: the class is the pair of columns that is lit. A broken row of the train split is not a number."""
    rng = np.random.default_rng(0)
    splits = {}
    for split, rows in ROWS.items():
        label = rng.integers(0, CLASSES, rows)
        pixels_BHW = rng.random((rows, 8, 8)) * 0.3
        pixels_BHW[np.arange(rows), :, 2 * label] += 0.7
        if split == "train" and broken_row is not None:
            pixels_BHW[broken_row] = np.nan
        columns: Columns = {
            "sample_id": np.arange(rows),
            "pixels": pixels_BHW[:, None].astype(np.float32),
            "label": label.astype(np.int32),
        }
        shard = write_shard(str(root), f"{split}/00000.parquet", columns, shard_schema(PIXELS), ROWS_PER_GROUP)
        splits[split] = Split(shards=(shard,), rows=rows, predictions=rows, documents=rows)
    details = {"channels": 1, "height": 8, "width": 8, "classes": [str(number) for number in range(CLASSES)]}
    return _described(
        root, splits, task="image_classification", columns=PIXELS, positions=1, outputs=CLASSES, details=details
    )


def text_like(root: Path) -> Path:
    """Counting modulo the vocabulary, from anywhere; held-out rows differ in length."""
    rng = np.random.default_rng(0)
    splits, fields = {}, shard_schema(TOKENS)
    for split, rows in ROWS.items():
        tokens_BS = (rng.integers(1, VOCABULARY, (rows, 1)) + np.arange(LENGTH + 1)) % VOCABULARY
        length_B = np.full(rows, LENGTH) if split == "train" else 1 + np.arange(rows) % LENGTH
        columns: Columns = {
            "sample_id": np.arange(rows),
            "document": np.zeros(rows, np.int32) - (split == "train"),
            "tokens": tokens_BS.astype(np.int32),
            "length": length_B.astype(np.int32),
        }
        predictions = int(length_B.sum())
        shard = write_shard(str(root), f"{split}/00000.parquet", columns, fields, ROWS_PER_GROUP, predictions)
        splits[split] = Split(shards=(shard,), rows=rows, predictions=predictions, documents=1)
    (root / TOKENIZER).write_text("{}")
    return _described(root, splits, task="language_modeling", columns=TOKENS, positions=LENGTH, outputs=VOCABULARY)


def _described(root: Path, splits: dict[str, Split], **data: Any) -> Path:
    manifest = Manifest(splits=splits, rows_per_group=ROWS_PER_GROUP, **data)
    (root / MANIFEST).write_text(manifest.model_dump_json())
    return root


def settings(**changes: object) -> Train:
    """A short training run of the small model."""
    kept = {"model": VIT, "steps": 6, "batch_size": 8, "learning_rate": 3e-3, "warmup_steps": 2, "validate_every": 4}
    return Train.model_validate(kept | {"workers": 1, "zero_stage": 1} | changes)
