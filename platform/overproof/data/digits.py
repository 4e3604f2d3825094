"""scikit-learn's bundled handwritten digits as shards."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from overproof.config import DigitsData
from overproof.data.columns import digits_schema
from overproof.data.manifest import SPLITS, Manifest, Shard, Split
from overproof.data.order import permutation
from overproof.data.parquet_writer import write_shard
from overproof.errors import InputError

BRIGHTEST = 16.0
CLASSES = 10
ROWS_STREAM, SPLIT_STREAM = 0, 1  # of the generator


def prepare_digits(data: DigitsData, seed: int, uri: str) -> Manifest:
    """Split by class, permute and write.

    Raises:
        InputError: a split is left empty, or there are more shards than row groups.
    """
    images = load_digits()
    pixels_RD = (images.data / BRIGHTEST).astype(np.float32)
    labels_R = images.target.astype(np.int32)
    splits = {}
    for name, rows in stratified(labels_R, data.validation_fraction, data.test_fraction, seed).items():
        if name == "train":
            rows = rows[: len(rows) // data.rows_per_group * data.rows_per_group]
        if not len(rows):
            raise InputError(
                f"digits: {len(labels_R)} images leave no {name} split; "
                "set data.validation_fraction, data.test_fraction and data.rows_per_group"
            )
        shards = _write(name, pixels_RD[rows], labels_R[rows], data, uri)
        splits[name] = Split(shards=shards, rows=len(rows), tokens=len(rows), documents=len(rows))
    return Manifest(
        kind="digits",
        splits=splits,
        rows_per_group=data.rows_per_group,
        sequence_length=None,
        vocab_size=None,
        classes=CLASSES,
        tokenizer_sha256=None,
        dropped={},
    )


def stratified(
    labels_R: NDArray[np.int32], validation_fraction: float, test_fraction: float, seed: int
) -> dict[str, NDArray[np.int64]]:
    """Rows of each split, permuted; every class gives each split its share, to the nearest image."""
    chosen: dict[str, list[NDArray[np.int64]]] = {name: [] for name in SPLITS}
    for label in np.unique(labels_R):
        own = np.flatnonzero(labels_R == label)
        own = own[permutation(seed, int(label), SPLIT_STREAM, len(own))]
        test = round(len(own) * test_fraction)
        validation = round(len(own) * validation_fraction)
        parts = np.split(own, [test, test + validation])
        for name, part in zip(("test", "validation", "train"), parts, strict=True):
            chosen[name].append(part)
    rows = {name: np.concatenate(parts) for name, parts in chosen.items()}
    return {name: own[permutation(seed, 0, ROWS_STREAM, len(own))] for name, own in rows.items()}


def _write(
    split: str, pixels_RD: NDArray[np.float32], labels_R: NDArray[np.int32], data: DigitsData, uri: str
) -> tuple[Shard, ...]:
    groups = -(-len(labels_R) // data.rows_per_group)
    shards = data.shards if split == "train" else 1
    if groups < shards:
        raise InputError(
            f"data.shards is {shards}, and the train split has {groups} row groups of {data.rows_per_group}; "
            "expected at least one for each shard: lower data.shards or data.rows_per_group"
        )
    ends = [int(own[-1] + 1) * data.rows_per_group for own in np.array_split(np.arange(groups), shards)]
    written, start = [], 0
    for index, end in enumerate(ends):
        columns: dict[str, NDArray[Any]] = {
            "sample_id": np.arange(start, min(end, len(labels_R)), dtype=np.int64),
            "pixels": pixels_RD[start:end],
            "label": labels_R[start:end],
        }
        written.append(write_shard(uri, f"{split}/{index:05d}.parquet", columns, digits_schema(), data.rows_per_group))
        start = end
    return tuple(written)
