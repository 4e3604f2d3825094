"""Which rows each shard holds: arithmetic on how many tokens and rows there are.

The tokens of the train documents, in the order of their hashes and each after its boundary, lie on one axis. The train
shards are equal parts of it, to a row group, whatever the documents' lengths: a document may lie in two or more of
them. The last token of a train shard is also the first of the next: it is predicted in one and predicted from in the
other. The rows of the validation and test documents lie on axes of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from overproof.config import TextData
from overproof.data import tokenization
from overproof.errors import InputError

SHARD_BYTES = 64 << 20  # of the rows of one file, about: a task holds those that it writes a few times over


@dataclass(frozen=True)
class ShardPlan:
    """One shard before it is written."""

    split: str
    index: int  # in its split
    first_sample: int
    rows: int

    @property
    def path(self) -> str:
        return f"{self.split}/{self.index:05d}.parquet"


def plan_train_shards(tokens: int, documents: int, data: TextData, row_bytes: int) -> list[ShardPlan]:
    """``data.shards`` of them, or more where these would be large.

    Raises:
        InputError: the train split does not fill one row group for each of its shards.
    """
    length = data.sequence_length
    groups = tokenization.train_rows(tokens, length, data.rows_per_group) // data.rows_per_group
    if groups < data.shards:
        raise InputError(
            f"the train split has {tokens} tokens in {documents} documents, which fill {groups} row groups of "
            f"{data.rows_per_group} rows of {length}; expected at least one for each shard: lower data.shards "
            f"({data.shards}), data.rows_per_group or data.sequence_length, or give more text"
        )
    shards = max(data.shards, min(groups, -(-groups * data.rows_per_group * row_bytes // SHARD_BYTES)))
    return _plan("train", [index * groups // shards * data.rows_per_group for index in range(shards + 1)])


def plan_held_out_shards(split: str, rows: int, data: TextData, row_bytes: int) -> list[ShardPlan]:
    """Of whole row groups, but for the end of the last one."""
    shard_rows = max(1, SHARD_BYTES // (row_bytes * data.rows_per_group)) * data.rows_per_group
    return _plan(split, [*range(0, rows, shard_rows), rows])


def _plan(split: str, borders: list[int]) -> list[ShardPlan]:
    return [ShardPlan(split, index, first, last - first) for index, (first, last) in enumerate(pairwise(borders))]
