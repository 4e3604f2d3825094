"""Which tokens each shard is made of: equal train shards, whatever the lengths of the documents."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from overproof.data.shard_layout import ShardLayout, plan_shards
from overproof.errors import InputError
from overproof.tasks.language_modeling import LanguageModelingData

SPLITS = ("train", "validation", "test")
LENGTH, GROUP = 8, 2

documents_of_pieces = st.lists(st.lists(st.integers(2, 30), min_size=1, max_size=4), min_size=6, max_size=20)


def settings(shards: int) -> LanguageModelingData:
    return LanguageModelingData(sequence_length=LENGTH, rows_per_group=GROUP, shards=shards)


def piece_table(documents: list[list[int]]) -> pa.Table:
    """A token of document d is 1000 d and its place in the document, from its end token on."""
    rows = []
    for document, pieces in enumerate(documents):
        start = 0
        for piece, count in enumerate(pieces):
            tokens = list(range(1000 * document + start, 1000 * document + start + count))
            rows.append({"document": document, "piece": piece, "tokens": tokens, "tokens_count": count})
            start += count
    return pa.Table.from_pylist(
        rows,
        pa.schema(
            [
                ("document", pa.int32()),
                ("piece", pa.int32()),
                ("tokens", pa.large_list(pa.int32())),
                ("tokens_count", pa.int64()),
            ]
        ),
    )


def plan(table: pa.Table, splits: list[str], shards: int) -> ShardLayout:
    columns = (table[column].to_numpy() for column in ("document", "piece", "tokens_count"))
    return plan_shards(*columns, splits_N=np.array(splits), data=settings(shards), boundary=1)


@given(documents_of_pieces, st.integers(1, 4), st.randoms(use_true_random=False))
def test_shards_hold_every_token_once_and_in_order(documents: list[list[int]], shards: int, random: object) -> None:
    splits = ["train", "validation", "train", "test", *["train"] * (len(documents) - 4)]
    documents[0] += [LENGTH * GROUP * shards]  # so that every shard has a row group
    table = piece_table(documents)
    order = list(range(len(table)))
    random.shuffle(order)  # type: ignore[attr-defined]
    layout = plan(table.take(order), splits, shards)
    halves = [table.take(order[: len(order) // 2]), table.take(order[len(order) // 2 :])]
    cut = pa.concat_tables([layout.cut(half) for half in halves if len(half)])
    cut = cut.sort_by([(name, "ascending") for name in ("shard", "document", "piece")])
    found = [np.concatenate(cut.filter(pa.compute.equal(cut["shard"], i))["tokens"].to_pylist())
             for i in range(len(layout.shards))]  # fmt: skip

    def stream(split: str) -> list[int]:
        return [1000 * d + i for d, pieces in enumerate(documents) if splits[d] == split for i in range(sum(pieces))]

    train = stream("train")
    first_row = 0
    for index, (shard, tokens) in enumerate(zip(layout.shards[:shards], found, strict=False)):
        assert (shard.split, shard.index, shard.first_sample) == ("train", index, first_row)
        assert tokens.tolist() == train[first_row * LENGTH : (first_row + shard.rows) * LENGTH + 1]
        first_row += shard.rows
    assert 0 <= len(train) - 1 - first_row * LENGTH < GROUP * LENGTH
    for shard, tokens in zip(layout.shards[shards:], found[shards:], strict=True):
        assert tokens.tolist() == stream(shard.split)
    assert [shard.split for shard in layout.shards[shards:]] == ["validation", "test"]
    sizes = [shard.rows // GROUP for shard in layout.shards[:shards]]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("large", [0, 3, 9])
def test_one_document_of_four_hundred_times_the_others_lies_in_every_shard(large: int) -> None:
    documents = [[50] for _ in range(10)]
    documents[large] = [400 * 50]
    table = piece_table(documents)
    layout = plan(table, ["train"] * 5 + ["validation", "test"] + ["train"] * 3, 4)
    rows = [shard.rows for shard in layout.shards[:4]]
    assert max(rows) - min(rows) <= GROUP
    cut = layout.cut(table)
    assert set(range(4)) <= set(cut.filter(pa.compute.equal(cut["document"], large))["shard"].to_pylist())


def test_rows_of_held_out_documents_are_counted_one_by_one() -> None:
    layout = plan(
        piece_table([[100], [8, 2], [9], [10], [2]]), ["train", "validation", "validation", "test", "test"], 1
    )
    assert [(shard.split, shard.rows) for shard in layout.shards[1:]] == [("validation", 2 + 1), ("test", 2 + 1)]


def test_too_few_tokens_for_the_shards_are_refused() -> None:
    with pytest.raises(
        InputError, match=r"train split has 40 tokens in 1 documents, which fill 2 row groups of 2 rows"
    ):
        plan(piece_table([[40], [9], [9]]), list(SPLITS), 3)
