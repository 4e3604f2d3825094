"""Planned rows into consumers: the exact rows of every step on every rank, whatever the cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from corpus import RECIPES, context, text_recipe, write_corpus
from ray.data import DataIterator, ExecutionResources

from overproof.config import load_recipe
from overproof.data.feed import BLOCK_STEPS, planned_dataset
from overproof.data.manifest import Manifest
from overproof.data.order import Order
from overproof.data.parquet_reader import Shards, table_to_numpy
from overproof.data.prepare import prepare


@pytest.fixture(scope="module")
def digits_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    given = context(load_recipe(RECIPES / "digits.yaml", (f"store={tmp_path_factory.mktemp('store')}",)))
    prepare(given)
    return Path(given.draft.uri)


@pytest.fixture(scope="module")
def ranks(ray_cluster: str) -> list[Any]:
    """Two processes that consume rows and report what came."""
    del ray_cluster

    class Rank:  # local, so that it travels to the workers by value
        def consume(self, split: DataIterator, rows: int) -> tuple[list[list[int]], dict[str, list[int]]]:
            """The rows of every batch, and the shapes of the last one's columns."""
            ids: list[list[int]] = []
            shapes: dict[str, list[int]] = {}
            for columns in map(table_to_numpy, split.iter_batches(batch_size=rows, batch_format="pyarrow")):
                ids.append(columns["sample_id"].tolist())
                shapes = {name: list(values.shape) for name, values in columns.items()}
            return ids, shapes

    return [ray.remote(num_cpus=0)(Rank).remote() for _ in range(2)]


@pytest.mark.parametrize("cpus", [2, 8])
def test_every_rank_gets_the_planned_rows(digits_root: Path, ranks: list[Any], cpus: int) -> None:
    """Two consumers, whatever CPUs reading may take: 3 epochs, from a step inside the first, over several blocks."""
    first, last, batch_size = 5, 5 + 2 * BLOCK_STEPS + 7, 24
    manifest = Manifest.read(digits_root)
    order = Order(manifest.groups, manifest.rows_per_group, seed=3)
    assert (last - first) * batch_size > 3 * order.rows
    assert ray.cluster_resources()["CPU"] >= cpus
    dataset = planned_dataset(digits_root, order, batch_size, first, last, 2)
    dataset.context.execution_options.resource_limits = ExecutionResources(cpu=cpus)
    splits = dataset.streaming_split(2, equal=True)
    found = ray.get([rank.consume.remote(split, batch_size // 2) for rank, split in zip(ranks, splits, strict=True)])
    for rank, (rows, shapes) in enumerate(found):
        assert rows == [order.step_rows(step, batch_size, rank, 2).tolist() for step in range(first, last)]
        assert shapes == {"sample_id": [12], "pixels": [12, 1, 8, 8], "label": [12]}


@pytest.mark.usefixtures("ray_cluster")
def test_text_rows_arrive_whole(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    given = context(text_recipe(tmp_path, f"{{kind: folder, path: {tmp_path / 'corpus'}}}"))
    prepare(given)
    root = Path(given.draft.uri)
    manifest = Manifest.read(root)
    order = Order(manifest.groups, manifest.rows_per_group, 0)
    shards = Shards(root, "train")
    found = planned_dataset(root, order, 6, 2, 12, 1).iter_batches(batch_size=6, batch_format="pyarrow")
    for step, table in zip(range(2, 12), found, strict=True):
        columns, ids = table_to_numpy(table), order.step_rows(step, 6)
        assert np.array_equal(columns["sample_id"], ids)
        for name, values in shards.take(ids).items():
            assert np.array_equal(columns[name], values)


def test_steps_and_shares_must_exist(digits_root: Path) -> None:
    order = Order(4, 4, 0)
    with pytest.raises(ValueError, match="batch_size 5 is not a multiple of 2 ranks"):
        planned_dataset(digits_root, order, 5, 0, 1, 2)
    with pytest.raises(ValueError, match="expected at least one"):
        planned_dataset(digits_root, order, 4, 3, 3, 2)
