"""Rows of a table split class by class and written as shards: for data that needs no pass through Ray Data."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from overproof.config.data import DataSection
from overproof.data.manifest import SAMPLE_ID, SPLITS, Column, Shard, Split, shard_schema
from overproof.data.order import permutation
from overproof.data.parquet_writer import write_shard
from overproof.errors import InputError

ROWS_STREAM, SPLIT_STREAM = 0, 1  # of the generator


@dataclass(frozen=True)
class Written:
    """The splits, and the first test row as an example of what a model is asked."""

    splits: dict[str, Split]
    example: dict[str, NDArray[Any]]


def write_splits(
    rows: Mapping[str, NDArray[Any]], splits: Mapping[str, NDArray[np.int64]], columns: tuple[Column, ...],
    data: DataSection, uri: str, noun: str, predictions_R: NDArray[np.int64] | None = None,
) -> Written:  # fmt: skip
    """Write the rows of each split; what does not fill a row group of the train split is left out.

    A row is one prediction, unless ``predictions_R`` says how many count in each.

    Raises:
        InputError: a split is left empty, or there are more shards than row groups.
    """
    written, example = {}, dict[str, NDArray[Any]]()
    for name, chosen in splits.items():
        if name == "train":
            chosen = chosen[: len(chosen) // data.rows_per_group * data.rows_per_group]
        if not len(chosen):
            raise InputError(
                f"data: {sum(map(len, splits.values()))} {noun} leave no {name} split; "
                "set data.validation_fraction, data.test_fraction and data.rows_per_group"
            )
        own = {column: values[chosen] for column, values in rows.items()}
        counts_R = None if predictions_R is None else predictions_R[chosen]
        shards = _write(name, own, columns, data, uri, counts_R)
        predictions = sum(shard.predictions for shard in shards)
        written[name] = Split(shards=shards, rows=len(chosen), predictions=predictions, documents=len(chosen))
        if name == "test":
            example = {column: values[0] for column, values in own.items()}
    return Written(written, example)


def stratified(
    strata_R: NDArray[np.int32], validation_fraction: float, test_fraction: float, seed: int
) -> dict[str, NDArray[np.int64]]:
    """Rows of each split, permuted; every stratum gives each split its share, to the nearest row."""
    chosen: dict[str, list[NDArray[np.int64]]] = {name: [] for name in SPLITS}
    for stratum in np.unique(strata_R):
        own = np.flatnonzero(strata_R == stratum)
        own = own[permutation(seed, int(stratum), SPLIT_STREAM, len(own))]
        test = round(len(own) * test_fraction)
        validation = round(len(own) * validation_fraction)
        parts = np.split(own, [test, test + validation])
        for name, part in zip(("test", "validation", "train"), parts, strict=True):
            chosen[name].append(part)
    rows = {name: np.concatenate(parts) for name, parts in chosen.items()}
    return {name: own[permutation(seed, 0, ROWS_STREAM, len(own))] for name, own in rows.items()}


def train_without_copies(values_R: NDArray[Any], splits: Mapping[str, NDArray[np.int64]]) -> NDArray[np.int64]:
    """The train rows whose values, to the last bit, no held-out row has."""

    def digest(row: np.int64) -> bytes:
        return hashlib.sha256(values_R[row].tobytes()).digest()

    held_out = {digest(row) for name, rows in splits.items() if name != "train" for row in rows}
    return np.array([row for row in splits["train"] if digest(row) not in held_out], np.int64)


def require_train_rows(
    labels_R: NDArray[np.int32], train: NDArray[np.int64], classes: Sequence[str], data: DataSection, noun: str
) -> None:
    """Look whether every class has rows that a model could learn it from: a rare one may be in other splits alone.

    Raises:
        InputError: one has none, though there are train rows.
    """
    kept = train[: len(train) // data.rows_per_group * data.rows_per_group]
    unseen = sorted(set(range(len(classes))) - set(labels_R[kept].tolist()))
    if unseen and len(kept):
        count = int((labels_R == unseen[0]).sum())
        raise InputError(
            f"data: class {classes[unseen[0]]!r} has {count} {noun}, and none falls into the train split; expected "
            f"several {noun} of each class: give more, or leave the class out"
        )


def _write(
    split: str, rows: Mapping[str, NDArray[Any]], columns: tuple[Column, ...], data: DataSection, uri: str,
    counts_R: NDArray[np.int64] | None,
) -> tuple[Shard, ...]:  # fmt: skip
    count = len(next(iter(rows.values())))
    groups = -(-count // data.rows_per_group)
    shards = data.shards if split == "train" else 1
    if groups < shards:
        raise InputError(
            f"data.shards is {shards}, and the train split has {groups} row groups of {data.rows_per_group}; "
            "expected at least one for each shard: lower data.shards or data.rows_per_group"
        )
    ends = [int(own[-1] + 1) * data.rows_per_group for own in np.array_split(np.arange(groups), shards)]
    written, start = [], 0
    for index, end in enumerate(ends):
        part = {name: values[start:end] for name, values in rows.items()}
        part[SAMPLE_ID] = np.arange(start, min(end, count), dtype=np.int64)
        path = f"{split}/{index:05d}.parquet"
        predictions = None if counts_R is None else int(counts_R[start:end].sum())
        written.append(write_shard(uri, path, part, shard_schema(columns), data.rows_per_group, predictions))
        start = end
    return tuple(written)
