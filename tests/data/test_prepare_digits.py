"""The digits as shards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from corpus import RECIPES, context
from sklearn.datasets import load_digits

from overproof.config import Recipe, load_recipe
from overproof.data.manifest import Manifest
from overproof.data.parquet_reader import Shards
from overproof.data.prepare import prepare
from overproof.data.stratified import stratified
from overproof.errors import InputError
from overproof.files import file_sha256


def recipe(store: Path, *changes: str) -> Recipe:
    return load_recipe(RECIPES / "digits.yaml", (f"store={store}", *changes))


def test_every_image_is_in_one_split(tmp_path: Path) -> None:
    given = context(recipe(tmp_path))
    metrics = prepare(given)
    root = Path(given.draft.uri)
    manifest = Manifest.read(root)
    assert (manifest.task, manifest.outputs, manifest.positions) == ("image_classification", 10, 1)
    assert manifest.splits["train"].rows == manifest.groups * manifest.rows_per_group
    assert metrics["rows"] == {name: split.rows for name, split in manifest.splits.items()}
    images = {name: Shards(root, name, ("sample_id", "pixels", "label")) for name in manifest.splits}
    taken = {name: shards.take(np.arange(shards.rows)) for name, shards in images.items()}
    for rows in taken.values():
        assert np.array_equal(rows["sample_id"], np.arange(len(rows["label"])))
        assert rows["pixels"].dtype == np.float32
        assert 0 <= rows["pixels"].min() <= rows["pixels"].max() == 1
    source = load_digits()
    known = {(tuple(p), int(t)) for p, t in zip(source.data, source.target, strict=True)}
    seen = [
        (tuple(p.ravel() * 16), int(t))
        for rows in taken.values()
        for p, t in zip(rows["pixels"], rows["label"], strict=True)
    ]
    assert set(seen) <= known
    assert len(set(seen)) == len(seen) == sum(metrics["rows"].values())
    assert len(known) - len(seen) < manifest.rows_per_group  # what does not fill a row group


def test_each_class_gives_each_split_its_share() -> None:
    labels = load_digits().target
    splits = stratified(labels, 0.15, 0.25, 0)
    assert sorted(np.concatenate(list(splits.values()))) == list(range(len(labels)))
    for name, share in {"train": 0.6, "validation": 0.15, "test": 0.25}.items():
        counts = np.bincount(labels[splits[name]], minlength=10)
        assert np.abs(counts - share * np.bincount(labels)).max() <= 1


def test_the_seed_alone_decides(tmp_path: Path) -> None:
    def hashes(name: str, *changes: str) -> list[str]:
        given = context(recipe(tmp_path, *changes), name)
        prepare(given)
        return [file_sha256(path) for path in sorted(Path(given.draft.uri).rglob("*.parquet"))]

    first, again, other = hashes("a"), hashes("b"), hashes("c", "seed=1")
    assert first == again
    assert not set(first) & set(other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.test_fraction=0.001", "leave no test split"),
        ("data.validation_fraction=0.001", "leave no validation split"),
        ("data.rows_per_group=2000", "leave no train split"),
        ("data.shards=100", "data.shards is 100, and the train split has 67 row groups"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(tmp_path: Path, change: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        prepare(context(recipe(tmp_path, change)))
