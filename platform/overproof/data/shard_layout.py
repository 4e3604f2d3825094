"""Which rows each shard holds, and which tokens of which document they are made of: arithmetic on token counts.

The tokens of all documents lie on one axis: train documents by hash, then those for validation, then those of the
test, each after its boundary: the end of the document before, and its own start. A shard is an interval of that axis.
The train shards are equal parts of the train documents, to a row group, whatever the documents' lengths: a document
may lie in two or more of them. The last token of a train shard is also the first of the next: it is predicted in one
and predicted from in the other.

N documents, P pieces of documents (by document and piece), K shards.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from overproof.config import TextData
from overproof.data import tokenization
from overproof.data.manifest import SPLITS
from overproof.errors import InputError

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class ShardPlan:
    """One shard before it is written."""

    split: str
    index: int  # in its split
    first_sample: int
    rows: int
    start: int  # of its tokens on the axis
    stop: int

    @property
    def path(self) -> str:
        return f"{self.split}/{self.index:05d}.parquet"


@dataclass(frozen=True)
class ShardLayout:
    """Every shard, and where every piece of a document starts."""

    shards: tuple[ShardPlan, ...]  # in the order of the axis
    first_piece_N: Counts
    starts_P: Counts

    def cut(self, block: pa.Table) -> pa.Table:
        """Tokens of documents by the shard they go to: a piece that crosses a border is cut there."""
        documents, pieces = (block[column].to_numpy() for column in ("document", "piece"))
        tokens = block["tokens"].combine_chunks()
        values, offsets = tokens.values.to_numpy(), tokens.offsets.to_numpy()
        starts = self.starts_P[self.first_piece_N[documents] + pieces]
        stops = starts + np.diff(offsets)
        first = np.searchsorted([shard.stop for shard in self.shards], starts, side="right")
        last = np.searchsorted([shard.start for shard in self.shards], stops, side="left")
        rows, own, cuts = [], [], []
        for row, (start, stop, offset) in enumerate(zip(starts, stops, offsets[:-1], strict=True)):
            for index in range(first[row], last[row]):
                shard = self.shards[index]
                rows.append(row)
                own.append(index)
                cuts.append(values[offset + max(shard.start - start, 0) : offset + min(shard.stop, stop) - start])
        return pa.table(
            {
                "shard": pa.array(own, pa.int32()),
                "document": pa.array(documents[rows], pa.int32()),
                "piece": pa.array(pieces[rows], pa.int32()),
                "tokens": pa.array(cuts, pa.large_list(pa.int32())),
            }
        )


def plan_shards(
    documents_P: Counts, pieces_P: Counts, tokens_P: Counts, splits_N: NDArray[np.str_], data: TextData, boundary: int
) -> ShardLayout:
    """The layout, from the number of tokens in each piece, in any order; each document's ``boundary`` tokens are
    counted.

    Raises:
        InputError: the train split does not fill one row group for each of its shards.
    """
    order = np.lexsort((pieces_P, documents_P))
    documents_P, tokens_P = documents_P[order], tokens_P[order]
    first_piece_N = np.searchsorted(documents_P, np.arange(len(splits_N)))
    split_N = np.array([SPLITS.index(split) for split in splits_N.tolist()])
    axis_P = np.argsort(split_N[documents_P], kind="stable")
    stops = np.cumsum(tokens_P[axis_P])
    starts_P = np.empty_like(stops)
    starts_P[axis_P] = stops - tokens_P[axis_P]
    tokens_N = np.add.reduceat(tokens_P, first_piece_N)
    shards = _train_shards(tokens_N[split_N == 0], data)
    start = int(tokens_N[split_N == 0].sum())
    for number, split in enumerate(SPLITS[1:], start=1):
        own = tokens_N[split_N == number]
        rows = sum(tokenization.document_rows(tokens - boundary, data.sequence_length) for tokens in own.tolist())
        shards.append(ShardPlan(split, 0, 0, rows, start, start + int(own.sum())))
        start += int(own.sum())
    return ShardLayout(tuple(shards), first_piece_N, starts_P)


def _train_shards(tokens_N: Counts, data: TextData) -> list[ShardPlan]:
    tokens, length = int(tokens_N.sum()), data.sequence_length
    groups = tokenization.train_rows(tokens, length, data.rows_per_group) // data.rows_per_group
    if groups < data.shards:
        raise InputError(
            f"the train split has {tokens} tokens in {len(tokens_N)} documents, which fill {groups} row groups of "
            f"{data.rows_per_group} rows of {length}; expected at least one for each shard: lower data.shards "
            f"({data.shards}), data.rows_per_group or data.sequence_length, or give more text"
        )
    borders = (np.arange(data.shards + 1) * groups // data.shards * data.rows_per_group).tolist()
    return [
        ShardPlan("train", index, first, last - first, first * length, last * length + 1)
        for index, (first, last) in enumerate(pairwise(borders))
    ]
