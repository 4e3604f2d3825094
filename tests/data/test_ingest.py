"""Planned rows into consumers: the exact rows of every step on every rank, whatever the cluster."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from corpus import RECIPES, context, text_recipe, write_corpus

from overproof.config import load_recipe
from overproof.data.feed import BLOCK_STEPS, planned_dataset
from overproof.data.manifest import Manifest
from overproof.data.order import Order
from overproof.data.prepare import prepare

CONSUME = Path(__file__).parent / "consume.py"


@pytest.fixture(scope="module")
def digits_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    given = context(load_recipe(RECIPES / "digits.yaml", (f"store={tmp_path_factory.mktemp('store')}",)))
    prepare(given)
    return Path(given.draft.uri)


@pytest.mark.parametrize("cpus", [2, 8])
def test_every_rank_gets_the_planned_rows(digits_root: Path, cpus: int) -> None:
    """Two consumers of a cluster of their own: 3 epochs, from a step inside the first, over several blocks."""
    first, last, batch_size = 5, 5 + 2 * BLOCK_STEPS + 7, 24
    done = subprocess.run(
        [sys.executable, CONSUME, digits_root, *map(str, (cpus, batch_size, first, last))],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    manifest = Manifest.read(digits_root)
    order = Order(manifest.groups, manifest.rows_per_group, seed=3)
    assert (last - first) * batch_size > 3 * order.rows
    for rank in range(2):
        planned = [order.step_rows(step, batch_size, rank, 2).tolist() for step in range(first, last)]
        assert found["rows"][rank] == planned
    assert found["columns"] == {"sample_id": [12], "pixels": [12, 1, 8, 8], "label": [12]}


@pytest.mark.usefixtures("ray_cluster")
def test_text_rows_arrive_whole(tmp_path: Path) -> None:
    import numpy as np

    from overproof.data.parquet_reader import Shards, table_to_numpy

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
