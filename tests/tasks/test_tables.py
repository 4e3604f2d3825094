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
from overproof.config import Pretrained, Recipe, load_recipe
from overproof.data.manifest import Manifest
from overproof.data.parquet_reader import Shards
from overproof.data.prepare import prepare
from overproof.data.stratified import require_train_rows
from overproof.engines.onnx_runtime import OnnxRuntime
from overproof.errors import InputError
from overproof.export.onnx_file import export_onnx
from overproof.export.onnx_int8 import quantize_onnx
from overproof.models.base import shape_of
from overproof.models.hf_directory import build_model, count_parameters, load_model, save_model, to_tensors
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
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.train().gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        TASKS[kind].predict(model, batch).logits_BPV.logsumexp(-1).sum().backward()
        gradients.append(model.layers[0].up.weight.grad.clone())
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().max() > 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            ("data.target=targt",),
            r"data: the table has no column 'targt', nearest is 'target'; expected one of age, colo",
        ),
        (("data.drop=[agee]",), r"no column 'agee', nearest is 'age'"),
        (("data.drop=[age, colour, member, grade, note, paid]", "data.categorical=[]"), r"no column beside 'target'"),
        (
            ("data.source.path=/nowhere/at/all",),
            r"data.source.path: /nowhere/at/all: not found; expected a folder that holds",
        ),
        (("data.shards=40",), r"shards"),
        (("data.drop=[target]",), r"target: expected in one of target, categorical and drop alone"),
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


def test_files_whose_columns_hold_other_numbers_are_one_table(tmp_path: Path) -> None:
    """Whole numbers in one file and decimals in another; ids beyond what a float holds; numbers beyond 32 bits."""
    (tmp_path / "t").mkdir()
    for number, column in enumerate((list(range(40)), [row + 0.5 for row in range(40)])):
        table = pa.table({"x": column, "id": [2**60 + row for row in range(40)], "huge": [1e300] * 40,
                          "flat": [0.1] * 40, "target": ["a", "b"] * 20})  # fmt: skip
        csv.write_csv(table, tmp_path / f"t/{number}.csv")
    source = f"{{kind: csv, path: {tmp_path}/t}}"
    asked = recipe(tmp_path, "tabular_classification", source, "data.categorical=[]", "data.drop=[]")
    root = prepared(asked)
    details = {column["name"]: column for column in Manifest.read(root).details["columns"]}
    features = dict(zip(details, whole(root)["features"].T, strict=True))
    assert sorted(features["x"]) == sorted([*range(40), *(row + 0.5 for row in range(40))])
    assert np.isnan(features["huge"]).all()
    assert np.isfinite(features["id"]).all()
    assert details["flat"]["deviation"] == 1.0  # not what rounding makes of equal numbers


def test_a_table_without_a_target_in_any_row_is_refused(tmp_path: Path) -> None:
    for kind, target in (("tabular_classification", "target"), ("tabular_regression", "paid")):
        none = TABLE.set_column(TABLE.column_names.index(target), target, pa.nulls(ROWS, TABLE[target].type))
        pq.write_table(none, tmp_path / "t.parquet")
        with pytest.raises(InputError, match=f"data.target: none of 80 rows has a '{target}'"):
            prepared(recipe(tmp_path, kind, f"{{kind: parquet, path: {tmp_path}/t.parquet}}"))


def test_classes_that_look_like_numbers_are_classes(tmp_path: Path) -> None:
    odd = TABLE.set_column(5, "target", pa.array([["--5", "-6"][row % 2] for row in range(ROWS)]))
    pq.write_table(odd, tmp_path / "t.parquet")
    root = prepared(recipe(tmp_path, "tabular_classification", f"{{kind: parquet, path: {tmp_path}/t.parquet}}"))
    assert Manifest.read(root).details["classes"] == ["--5", "-6"]


def test_a_model_of_other_columns_is_no_start(tmp_path: Path) -> None:
    pq.write_table(TABLE, tmp_path / "t.parquet")
    source = f"{{kind: parquet, path: {tmp_path}/t.parquet}}"
    asked = recipe(tmp_path / "one", "tabular_classification", source)
    model = build_model(asked.train.model, Manifest.read(prepared(asked)), 0)
    save_model(model, model.config, tmp_path / "model")
    other = recipe(tmp_path / "two", "tabular_classification", source, "data.drop=[note, paid, age]")
    manifest = Manifest.read(prepared(other))
    with pytest.raises(InputError, match=r"takes 4 columns with \[0, .*; the data has 3"):
        model_size(Pretrained(path=str(tmp_path / "model")), shape_of(manifest))


def test_an_outlier_does_not_change_the_rows_beside_it(tmp_path: Path) -> None:
    """int8 has one scale for the activations of a batch, and a server puts rows of several clients into one."""
    pq.write_table(TABLE, tmp_path / "t.parquet")
    asked = recipe(tmp_path, "tabular_classification", f"{{kind: parquet, path: {tmp_path}/t.parquet}}")
    root = prepared(asked)
    model = build_model(asked.train.model, Manifest.read(root), 0).eval()
    save_model(model, model.config, tmp_path / "model")
    export_onnx(tmp_path / "model", tmp_path / "fp32.onnx")
    quantize_onnx(tmp_path / "fp32.onnx", tmp_path / "int8.onnx")
    engine = OnnxRuntime(tmp_path / "int8.onnx")
    rows = whole(root)["features"][:4]
    huge = rows[:1].copy()
    huge[0, 0] = 1e30
    alone, beside = engine.logprobs(rows), engine.logprobs(np.concatenate([rows, huge]))
    assert np.isfinite(beside).all()
    np.testing.assert_allclose(beside[:4], alone, atol=0.1)


def test_files_that_are_no_tables_are_named(tmp_path: Path) -> None:
    (tmp_path / "t.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(InputError, match=r"t\.parquet: not parquet"):
        prepared(recipe(tmp_path, "tabular_classification", f"{{kind: parquet, path: {tmp_path}/t.parquet}}"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("x,x,target\n1,2,a\n", r"t\.csv: several columns are named 'x'; expected a name of its own for each"),
        ("größe,target\n1,a\n", r"t\.csv: not UTF-8: .*; expected text in UTF-8"),
        ("x,target\n1,grün\n2,rot\n", r"t\.csv: column 'target' is not UTF-8; expected text in UTF-8"),
        ("x,colour,target\n1,grün,a\n", r"t\.csv: column 'colour' is not UTF-8"),
    ],
)
def test_a_csv_of_odd_names_and_bytes_is_named(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=words):
        prepared(recipe(tmp_path, "tabular_classification", f"{{kind: csv, path: {tmp_path}/t.csv}}"))


def test_a_cell_may_hold_the_end_of_a_line(tmp_path: Path) -> None:
    rows = [["first\nsecond" if row % 4 else "one", str(row), str(row % 2)] for row in range(60)]
    csv.write_csv(
        pa.table(dict(zip(("kind", "x", "target"), zip(*rows, strict=True), strict=True))), tmp_path / "t.csv"
    )
    source = f"{{kind: csv, path: {tmp_path}/t.csv}}"
    root = prepared(recipe(tmp_path, "tabular_classification", source, "data.categorical=[]", "data.drop=[]"))
    assert Manifest.read(root).details["columns"][0]["categories"] == ["first\nsecond", "one"]


def test_a_class_that_no_row_to_train_on_has_is_named() -> None:
    """Though it was split class by class: what fills no row group is left out."""
    data = load_recipe(RECIPES / "wine.yaml", ("data.rows_per_group=4",)).data
    labels_R, train = np.array([0, 0, 0, 1, 2, 2], np.int32), np.array([0, 1, 2, 3, 4])
    with pytest.raises(InputError, match=r"data: class 'c' has 2 rows, and none falls into the train split; expected"):
        require_train_rows(labels_R, train, ["a", "b", "c"], data, "rows")
    require_train_rows(labels_R, np.array([0, 3, 4, 5, 1]), ["a", "b", "c"], data, "rows")
