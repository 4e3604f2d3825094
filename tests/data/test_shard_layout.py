"""Which rows each shard holds: equal train shards, and more of them where there is more text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overproof.data import shard_layout
from overproof.data.shard_layout import plan_held_out_shards, plan_train_shards
from overproof.errors import InputError
from overproof.tasks.language_modeling import LanguageModelingData

LENGTH, GROUP, ROW_BYTES = 8, 2, 34


def settings(shards: int) -> LanguageModelingData:
    return LanguageModelingData(sequence_length=LENGTH, rows_per_group=GROUP, shards=shards)


@given(st.integers(0, 5000), st.integers(1, 4), st.integers(1, 20))
def test_train_shards_are_equal_whole_groups_and_small(tokens: int, shards: int, groups_per_file: int) -> None:
    groups = max(tokens - 1, 0) // LENGTH // GROUP
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_layout, "SHARD_BYTES", groups_per_file * GROUP * ROW_BYTES)
        if groups < shards:
            with pytest.raises(InputError, match=f"has {tokens} tokens in 7 documents, which fill {groups} row groups"):
                plan_train_shards(tokens, 7, settings(shards), ROW_BYTES)
            return
        plans = plan_train_shards(tokens, 7, settings(shards), ROW_BYTES)
    assert len(plans) == max(shards, -(-groups // groups_per_file))
    assert [plan.path for plan in plans] == [f"train/{index:05d}.parquet" for index in range(len(plans))]
    assert [plan.first_sample for plan in plans] == [sum(p.rows for p in plans[:i]) for i in range(len(plans))]
    assert sum(plan.rows for plan in plans) == groups * GROUP
    sizes = [plan.rows // GROUP for plan in plans]
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= max(groups_per_file, -(-groups // shards))


@pytest.mark.parametrize(("rows", "found"), [(1, [1]), (6, [6]), (7, [6, 1]), (13, [6, 6, 1])])
def test_held_out_rows_are_in_files_of_whole_groups(
    rows: int, found: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_layout, "SHARD_BYTES", 3 * GROUP * ROW_BYTES + 1)
    plans = plan_held_out_shards("test", rows, settings(1), ROW_BYTES)
    assert [plan.rows for plan in plans] == found
    assert [plan.first_sample for plan in plans] == [sum(found[:index]) for index in range(len(found))]
