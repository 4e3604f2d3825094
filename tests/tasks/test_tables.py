"""Tables of any source as shards: what is read, what stands for what is missing, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pyarrow import csv

from finished import RECIPES
from overproof.artifacts import Store
from overproof.config import Recipe, load_recipe
from overproof.data.manifest import Manifest
from overproof.data.parquet_reader import Shards
from overproof.data.prepare import prepare
from overproof.errors import InputError
from overproof.models.hf_directory import build_model, count_parameters, load_model, save_model, shape_of, to_tensors
from overproof.models.sizes import model_size
from overproof.registry import TASKS
from overproof.stage_context import StageContext, no_progress
from overproof.tasks.tabular import encode_cell

ROWS = 80
TABLE = pa.table(
    {
        "age": pa.array([None if row % 10 == 3 else row / 2 for row in range(ROWS)], pa.float64()),
        "colour": pa.array([["red", "green", "blue", None][row % 4] for row in range(ROWS)], pa.string()),
        "member": pa.array([row % 3 == 0 for row in range(ROWS)], pa.bool_()),
        "grade": pa.array([1 + row % 5 for row in range(ROWS)], pa.int64()),
        "note": pa.array([f"row {row}" for row in range(ROWS)], pa.string()),
        "target": pa.array([["yes", "no"][row % 2] for row in range(ROWS)], pa.string()),
        "paid": pa.array([row * 1.5 for row in range(ROWS)], pa.float64()),
    }
)


def recipe(store: Path, kind: str, source: str, *changes: str) -> Recipe:
    data = (
        f"data={{kind: {kind}, source: {source}, categorical: [grade], drop: [note, "
        f"{'paid' if kind == 'tabular_classification' else 'target'}], shards: 2, rows_per_group: 4, "
        "validation_fraction: 0.2, test_fraction: 0.2}"
    )
    own = ("data.target=paid", "data.bins=4") if kind == "tabular_regression" else ()
    return load_recipe(RECIPES / "wine.yaml", (f"store={store}", data, *own, *changes))


def prepared(asked: Recipe) -> Path:
    draft = Store(asked.store).new_writer(asked.name, "prepare", "a" * 64, {}, {})
    prepare(StageContext(asked, {}, draft, no_progress))
    return Path(draft.uri)


def whole(root: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Every row of all splits."""
    names = ("features", "label", "value")
    parts = [
        shards.take(np.arange(shards.rows))
        for shards in (Shards(root, split, names) for split in Manifest.read(root).splits)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in names}


@pytest.fixture(params=["csv", "parquet"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The table in two files of a folder."""
    folder = tmp_path / "tables"
    folder.mkdir()
    for number, part in enumerate((TABLE[:50], TABLE[50:])):
        file = folder / f"{number}.{request.param}"
        csv.write_csv(part, file) if request.param == "csv" else pq.write_table(part, file)
    return f"{{kind: {request.param}, path: {folder}}}"


def test_a_table_is_read_as_its_columns_say(source: str, tmp_path: Path) -> None:
    root = prepared(recipe(tmp_path, "tabular_classification", source))
    manifest, rows = Manifest.read(root), whole(root)
    columns = {column["name"]: column for column in manifest.details["columns"]}
    assert list(columns) == ["age", "colour", "member", "grade"]
    assert columns["age"]["categories"] == []
    assert [c for c in columns["colour"]["categories"] if c] == ["blue", "green", "red"]
    assert columns["member"]["categories"] == ["false", "true"]
    assert columns["grade"]["categories"] == ["1", "2", "3", "4", "5"]
    assert manifest.details["classes"] == ["no", "yes"]
    assert len(rows["label"]) == ROWS
    assert np.isnan(rows["features"][:, 0]).sum() == ROWS // 10
    expected = {tuple(np.nan_to_num(row, nan=-1.0)) for row in encoded_table(columns)}
    assert {tuple(np.nan_to_num(row, nan=-1.0).tolist()) for row in rows["features"]} == expected


def encoded_table(columns: dict[str, Any]) -> list[list[float]]:
    """The table's rows as a request's are read, with an empty text where CSV has one."""
    empty = "" in columns["colour"]["categories"]
    rows = [row | {"colour": "" if empty and row["colour"] is None else row["colour"]} for row in TABLE.to_pylist()]
    return [
        [float(np.float32(encode_cell(row[name], column, name))) for name, column in columns.items()] for row in rows
    ]


def test_a_number_is_learnt_as_the_bin_it_falls_into(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    lacking = TABLE.set_column(6, "paid", pa.array([float("nan"), None, *(row * 1.5 for row in range(2, ROWS))]))
    pq.write_table(lacking, tmp_path / "t/t.parquet")
    asked = recipe(tmp_path, "tabular_regression", f"{{kind: parquet, path: {tmp_path}/t}}", "data.rows_per_group=1")
    root = prepared(asked)
    manifest, rows = Manifest.read(root), whole(root)
    centres, edges = (np.array(manifest.details[name]) for name in ("centres", "edges"))
    assert manifest.dropped == {"no target": 2}
    assert (len(centres), len(edges), manifest.outputs) == (4, 3, 4)
    np.testing.assert_array_equal(rows["label"], np.searchsorted(edges, rows["value"], side="right"))
    train = Shards(root, "train", ("label", "value"))
    own = train.take(np.arange(train.rows))
    for label, centre in enumerate(centres):
        assert own["value"][own["label"] == label].mean() == pytest.approx(centre)
    counts = np.bincount(own["label"])
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("kind", ["tabular_classification", "tabular_regression"])
def test_a_model_of_rows_has_the_size_that_is_planned_and_survives_its_directory(kind: str, tmp_path: Path) -> None:
    pq.write_table(TABLE, tmp_path / "t.parquet")
    asked = recipe(tmp_path, kind, f"{{kind: parquet, path: {tmp_path}/t.parquet}}")
    root = prepared(asked)
    manifest = Manifest.read(root)
    model = build_model(asked.train.model, manifest, 0).eval()
    assert model_size(asked.train.model, shape_of(manifest)).parameters == count_parameters(model)
    save_model(model, model.config, tmp_path / "model")
    shards = Shards(root, "test", manifest.batch_columns)
    batch = to_tensors(shards.take(np.arange(shards.rows)))
    one, two = (TASKS[kind].predict(each, batch).logits_BPV for each in (model, load_model(tmp_path / "model").eval()))
    assert torch.equal(one, two)
    assert torch.isfinite(one).all()  # of rows with missing values, too


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            ("data.target=targt",),
            r"data: the table has no column 'targt', nearest is 'target'; expected one of age, colo",
        ),
        (("data.drop=[agee]",), r"no column 'agee', nearest is 'age'"),
        (("data.drop=[age, colour, member, grade, note, paid]", "data.categorical=[]"), r"no column beside 'target'"),
        (("data.source.path=/nowhere/at/all",), r"data.source.path: /nowhere/at/all: no .parquet file"),
        (("data.shards=40",), r"shards"),
    ],
)
def test_what_cannot_be_used_is_refused(changes: tuple[str, ...], words: str, tmp_path: Path) -> None:
    pq.write_table(TABLE, tmp_path / "t.parquet")
    with pytest.raises(InputError, match=words):
        prepared(recipe(tmp_path, "tabular_classification", f"{{kind: parquet, path: {tmp_path}/t.parquet}}", *changes))


def test_text_is_no_target_of_a_regression(tmp_path: Path) -> None:
    pq.write_table(TABLE, tmp_path / "t.parquet")
    source = f"{{kind: parquet, path: {tmp_path}/t.parquet}}"
    with pytest.raises(InputError, match=r"data.target: 'target': is string; expected numbers"):
        prepared(recipe(tmp_path, "tabular_regression", source, "data.target=target", "data.drop=[note]"))


def test_files_that_are_no_tables_are_named(tmp_path: Path) -> None:
    (tmp_path / "t.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(InputError, match=r"t\.parquet: not parquet"):
        prepared(recipe(tmp_path, "tabular_classification", f"{{kind: parquet, path: {tmp_path}/t.parquet}}"))
