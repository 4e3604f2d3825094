"""Tables of any source as shards: read by Arrow, split by stratum, described from the train rows, and written.

Shapes: R rows, C columns.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from importlib.metadata import version
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyarrow import csv, fs

from overproof.data.cleaning import NUL_LINES
from overproof.data.csv_rows import csv_options
from overproof.data.manifest import Column, Manifest
from overproof.data.parquet_columns import is_text, open_parquet, read_table, require_one_each
from overproof.data.source_files import (
    FileListing,
    SourceFile,
    SourceReading,
    UnreadableFile,
    describe_skipped,
    list_suffix,
    naming_faults,
    open_content,
)
from overproof.data.sources import sha256_of
from overproof.data.stratified import require_train_rows, stratified, write_splits
from overproof.errors import InputError, suggest_name
from overproof.files import filesystem
from overproof.stage_context import Notice, StageContext, TaskProgress

if TYPE_CHECKING:
    from overproof.tasks.tabular import TableData

STRATA = 8  # of a target that is a number: groups of rows of which each split gets its share
LARGEST = float(np.finfo(np.float32).max)
MOST_CATEGORIES = 10_000
TINY = 1e-12  # a share of the mean: a deviation that rounding alone makes


def table_digest(data: TableData) -> str:
    """Sha256, in hex, over the names, sizes and times of a source's files.

    Raises:
        InputError: there are none.
    """
    source: Any = data.source
    if source.kind == "sklearn":
        return sha256_of(["scikit-learn", version("scikit-learn"), source.name])
    return sha256_of(table_files(data).identity)


def describe_table(data: TableData) -> dict[str, Any]:
    """What models must fit, as far as it is known before rows are split.

    Raises:
        InputError: the table cannot be read, or a column is missing or of another kind.
    """
    table, _, _ = _read(data)
    return _describe(table, data, np.arange(table.num_rows))


def prepare_table(context: StageContext) -> Manifest:
    """Read, split by stratum, describe the columns by the train rows alone, and write.

    Raises:
        InputError: the source is not what the recipe says, a split is left empty, or there are more shards than row
            groups.
    """
    data: Any = context.recipe.data
    context.progress(TaskProgress("prepare", 0, 2, "reading the table"))
    table, dropped, skipped = _read(data)
    for line in describe_skipped(skipped):
        context.progress(Notice(line))
    splits = stratified(_strata(table, data), data.validation_fraction, data.test_fraction, context.recipe.seed)
    details = _describe(table, data, splits["train"])
    features_RC = np.column_stack([_features(table[c["name"]], c) for c in details["columns"]]).astype(np.float32)
    columns = (
        Column(name="features", dtype="<f4", shape=(features_RC.shape[1],)),
        Column(name="label", dtype="<i4"),
        Column(name="value", dtype="<f8", batch=False),
    )
    values_R, labels_R = _targets(table, data, details)
    context.progress(TaskProgress("prepare", 1, 2, f"writing {len(labels_R):,} rows"))
    rows: dict[str, NDArray[Any]] = {"features": features_RC, "label": labels_R, "value": values_R}
    if "edges" not in details:
        require_train_rows(labels_R, splits["train"], details["classes"], data, "rows")
    written = write_splits(rows, splits, columns, data, context.draft.uri, "rows")
    example = {
        column["name"]: _cell(float(value), column)
        for column, value in zip(details["columns"], written.example["features"], strict=True)
    }
    return Manifest(
        task=data.kind,
        columns=columns,
        splits=written.splits,
        rows_per_group=data.rows_per_group,
        positions=1,
        outputs=len(details["classes"]),
        dropped=dropped,
        skipped={reason: len(names) for reason, names in skipped.items()},
        details=details | {"example": example},
    )


def table_files(data: TableData) -> FileListing:
    """The files of a recipe's section; none of what scikit-learn has.

    Raises:
        InputError: there are none.
    """
    source: Any = data.source
    if source.kind == "sklearn":
        return FileListing("", ())
    return list_suffix(source.path, f".{source.kind}", data.on_error)


def _read(data: TableData) -> tuple[pa.Table, dict[str, int], dict[str, list[str]]]:
    """The columns that are looked at, of the rows that have a target; how many have none; and files left out."""
    source: Any = data.source
    reading = SourceReading(table_files(data), data.on_error)
    if source.kind == "sklearn":
        whole = _bundled(source.name)
    else:
        files, _ = filesystem(source.path)

        def read(file: SourceFile) -> list[pa.Table]:
            return [_one_file(files, reading.listing.path(file), source.kind, data.drop, reading)]

        try:
            whole = pa.concat_tables(list(reading.each_file(read)), promote_options="permissive")
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise InputError(f"data.source.path: {source.path}: the files' columns differ: {error}") from None
    for field in (data.target, *data.categorical, *data.drop):
        if field not in whole.column_names:
            near, names = suggest_name(field, whole.column_names), ", ".join(whole.column_names)
            raise InputError(f"data: the table has no column {field!r}{near}; expected one of {names}")
    table = whole.select([name for name in whole.column_names if name not in data.drop])
    target = table[data.target]
    known_R = pc.fill_null(pc.is_finite(target), False) if pa.types.is_floating(target.type) else pc.is_valid(target)
    rows = int(pc.sum(known_R).as_py() or 0)
    if not rows:
        raise InputError(f"data.target: none of {table.num_rows:,} rows has a {data.target!r}; expected some")
    dropped = {"no target": table.num_rows - rows} | ({NUL_LINES: reading.nul_lines} if reading.nul_lines else {})
    return table.filter(known_R), dropped, reading.skipped


def _bundled(name: str) -> pa.Table:
    from sklearn import datasets

    bundled: Any = getattr(datasets, f"load_{name}")()
    columns = {str(c): bundled.data[:, i] for i, c in enumerate(bundled.feature_names)}
    names = getattr(bundled, "target_names", None)
    target = bundled.target if names is None else np.asarray(names)[bundled.target]
    return pa.table({**columns, "target": target})


def _one_file(files: fs.FileSystem, path: str, kind: str, drop: Sequence[str], reading: SourceReading) -> pa.Table:
    """A table; the columns to drop have their names alone, where it is Parquet: nothing reads them."""
    with naming_faults(path, kind):
        if kind == "csv":
            with open_content(files, path) as stream:
                table = csv.read_csv(stream, parse_options=csv_options(reading))
            require_one_each(table.column_names, table.column_names, path)
        else:
            with files.open_input_file(path) as handle:
                file = open_parquet(handle)
                names, rows = file.schema_arrow.names, file.metadata.num_rows
                require_one_each(names, names, path)
                table = read_table(handle, path, [name for name in names if name not in drop])
            for name in (name for name in names if name in drop):
                table = table.append_column(name, pa.nulls(rows))
    for column in table.schema:
        if kind == "csv" and pa.types.is_binary(column.type):  # what Arrow makes of text that is no UTF-8
            raise UnreadableFile(f"{path}: column {column.name!r} is not UTF-8; expected text in UTF-8", "not UTF-8")
    return table


def _describe(table: pa.Table, data: TableData, train_rows: NDArray[np.int64]) -> dict[str, Any]:
    """The columns and the target, by the train rows alone."""
    train = table.take(pa.array(train_rows))
    names = [name for name in table.column_names if name != data.target]
    if not names:
        raise InputError(f"data: the table has no column beside {data.target!r}; expected one at least")
    columns = [_column(train[name], name, name in data.categorical) for name in names]
    bins = getattr(data, "bins", None)
    if bins is None:
        return {"columns": columns, "classes": _categories(train[data.target], f"data.target {data.target!r}")}
    values_R = _numbers(train[data.target], f"data.target: {data.target!r}")
    ends = np.quantile(values_R, np.linspace(0, 1, bins + 1)[1:-1]) if len(values_R) else np.zeros(0)
    edges = np.unique(ends)
    bin_R = np.searchsorted(edges, values_R, side="right")
    centres = [float(values_R[bin_R == number].mean()) for number in range(len(edges) + 1) if (bin_R == number).any()]
    if len(centres) <= len(edges):  # a bin between equal values is empty
        edges = np.array([(a + b) / 2 for a, b in pairwise(centres)])
    return {"columns": columns, "classes": [f"{c:.6g}" for c in centres], "centres": centres, "edges": edges.tolist()}


def _column(values: pa.ChunkedArray, name: str, as_category: bool) -> dict[str, Any]:
    kind = values.type
    if as_category or pa.types.is_boolean(kind) or pa.types.is_dictionary(kind) or is_text(kind):
        return {"name": name, "categories": _categories(values, f"column {name!r}"), "mean": 0.0, "deviation": 1.0}
    known = _numbers(values, f"column {name!r}")
    known = known[np.isfinite(known)]
    deviation = float(known.std()) if len(known) else 0.0
    mean = float(known.mean()) if len(known) else 0.0
    return {
        "name": name,
        "categories": [],
        "mean": mean,
        "deviation": deviation if deviation > TINY * abs(mean) else 1.0,
    }


def _numbers(values: pa.ChunkedArray, what: str) -> NDArray[np.float64]:
    if not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type) or pa.types.is_decimal(values.type)):
        raise InputError(
            f"{what}: is {values.type}; expected numbers: drop it (data.drop) or write it as numbers or text"
        )
    numbers: NDArray[np.float64] = pc.cast(values, pa.float64(), safe=False).to_numpy()
    return numbers


def _categories(values: pa.ChunkedArray, what: str) -> list[str]:
    """Those there are: whole numbers in their order, else by name."""
    found = pc.unique(_text(values)).drop_null().to_pylist()
    if not 0 < len(found) <= MOST_CATEGORIES:
        raise InputError(
            f"{what}: has {len(found):,} categories; expected 1 to {MOST_CATEGORIES:,}: drop it (data.drop)"
        )
    return sorted(found, key=int) if all(re.fullmatch(r"-?[0-9]+", c) for c in found) else sorted(found)


def _text(values: pa.ChunkedArray) -> pa.ChunkedArray:
    decoded = values.cast(values.type.value_type) if pa.types.is_dictionary(values.type) else values
    return pc.cast(decoded, pa.string())


def _features(values: pa.ChunkedArray, column: dict[str, Any]) -> NDArray[np.float64]:
    """A column as models take it; a category that the train rows lack is missing, like no value at all."""
    if not column["categories"]:
        numbers: NDArray[np.float64] = pc.cast(values, pa.float64(), safe=False).to_numpy()
        return np.where(np.abs(numbers) <= LARGEST, numbers, np.nan)
    places = pc.index_in(_text(values), value_set=pa.array(column["categories"], pa.string()))
    known: NDArray[np.float64] = pc.cast(places, pa.float64()).to_numpy()
    return np.asarray(known, np.float64)


def _strata(table: pa.Table, data: TableData) -> NDArray[np.int32]:
    """Groups of rows of which each split gets its share: classes, or quantiles of the target."""
    target = table[data.target]
    if getattr(data, "bins", None) is None:
        return np.unique(_text(target).to_numpy(zero_copy_only=False).astype(str), return_inverse=True)[1].astype(
            np.int32
        )
    values_R = _numbers(target, f"data.target: {data.target!r}")
    edges = np.quantile(values_R, np.linspace(0, 1, STRATA + 1)[1:-1])
    return np.searchsorted(edges, values_R, side="right").astype(np.int32)


def _targets(
    table: pa.Table, data: TableData, details: dict[str, Any]
) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
    """The target as it is, and as the class or bin that it falls into."""
    target = table[data.target]
    if "edges" in details:
        values_R = _numbers(target, f"data.target: {data.target!r}")
        return values_R, np.searchsorted(np.array(details["edges"]), values_R, side="right").astype(np.int32)
    labels = pc.index_in(_text(target), value_set=pa.array(details["classes"], pa.string()))
    unseen = pc.sum(pc.is_null(labels)).as_py()
    if unseen:
        raise InputError(
            f"data.target: {unseen} rows have a class that no train row has; expected several rows of each class"
        )
    labels_R = labels.to_numpy().astype(np.int32)
    return labels_R.astype(np.float64), labels_R


def _cell(value: float, column: dict[str, Any]) -> float | str | None:
    """A number of a row as a request would give it."""
    if math.isnan(value):
        return None
    categories: Sequence[str] = column["categories"]
    return categories[int(value)] if categories else float(f"{value:.6g}")
