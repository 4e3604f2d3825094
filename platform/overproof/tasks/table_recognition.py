"""Whether data are a table with a column to predict, by class or by number, and how its recipe names them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from overproof.data.parquet_columns import is_text
from overproof.tasks.recognition import (
    ColumnFlags,
    DataLook,
    Fit,
    Misfit,
    Recognised,
    choose_column,
)
from overproof.tasks.table_samples import TableSample

TARGET_NAMES = ("target", "label", "class", "y", "outcome")
FEWEST_ROWS = 50  # that leave some for validation and test
MOST_CLASSES = 100  # of whole numbers; more of them are amounts
ALMOST_UNIQUE = 0.5  # share of rows with a value of their own, from which on text is an id or prose
REFIT = "how it numbers categories and classes is not known here"


def recognise_table(
    look: DataLook, model: Mapping[str, Any] | None, flags: ColumnFlags, regression: bool
) -> Recognised:
    """CSV or Parquet with a column to predict: by classes, or by numbers where it is a regression."""
    suffixes = look.having(".csv", ".parquet")
    if len(suffixes) != 1:
        return Misfit(f"expected CSV or Parquet, and one of them alone: {look.described}")
    sample = look.sample(suffixes[0])
    if isinstance(sample, Misfit):
        return sample
    target = choose_column(sample, flags.label, "--label", TARGET_NAMES, _usable(sample), "the one to predict")
    if not isinstance(target, tuple):
        return target
    name, why = target
    values = sample.rows[name].drop_null()
    unfit = _not_numbers(values) if regression else not_classes(values)
    if unfit:
        part = f", {sample.part}," if sample.part else ""
        return Misfit(f"column {name!r}{part} {unfit}")
    dropped = _dropped(sample, name)
    left = [column for column in sample.schema.names if column not in dropped and column != name]
    if not left:
        return Misfit(f"no column is left beside {name!r}: {sample.listed}")
    if sample.total_rows < FEWEST_ROWS:
        return Misfit(f"{sample.total_rows} rows; expected {FEWEST_ROWS} at least, for train, validation and test")
    data: dict[str, Any] = {"source": {"kind": suffixes[0][1:], "path": look.path}, "target": name}
    kind = "its numbers" if regression else f"one of {pc.count_distinct(values).as_py()} classes"
    reasons = {
        "rows": f"about {sample.total_rows:,}, {len(left)} columns to predict from",
        "target": f"column {name!r}, {why}; {kind}{f', {sample.part}' if sample.part else ''}",
    }
    if dropped:
        data["drop"] = sorted(dropped)
        reasons["left out"] = "; ".join(f"{column} ({reason})" for column, reason in sorted(dropped.items()))
    refit = None if model is None else REFIT
    rows = sample.total_rows
    return Fit(data, rows, rows, reasons, refit=refit, flags=frozenset({"--label"}))


def _usable(sample: TableSample) -> list[str]:
    return sample.columns(
        is_text, pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_boolean,
        pa.types.is_dictionary,
    )  # fmt: skip


def _whole(values: pa.ChunkedArray) -> bool:
    """Whether a column of numbers holds whole ones alone."""
    if pa.types.is_integer(values.type):
        return True
    numbers = pc.cast(values, pa.float64(), safe=False)
    numbers = numbers.filter(pc.is_finite(numbers))
    return bool(pc.all(pc.equal(numbers, pc.floor(numbers))).as_py())


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def _not_numbers(values: pa.ChunkedArray) -> str | None:
    """Why a column is no target of a regression."""
    if not _is_number(values.type):
        return f"is {values.type}; a regression predicts numbers"
    if pc.count_distinct(values).as_py() <= 2:
        return "has two values or fewer; a regression predicts amounts"
    return None


def not_classes(values: pa.ChunkedArray) -> str | None:
    """Why a column has no classes."""
    distinct = pc.count_distinct(values).as_py()
    if distinct < 2:
        return f"has {distinct} value; expected two classes or more"
    if _is_number(values.type) and not _whole(values):
        return "holds fractions, which are no classes"
    if _is_number(values.type) and distinct > MOST_CLASSES:
        return f"has {distinct:,} different numbers; expected {MOST_CLASSES} classes at most"
    if is_text(values.type) and len(values) >= FEWEST_ROWS and distinct > ALMOST_UNIQUE * len(values):
        return f"has {distinct:,} different texts in {len(values):,} rows, which are no classes"
    return None


def _dropped(sample: TableSample, target: str) -> dict[str, str]:
    """Columns that no model reads, and why."""
    usable, found = set(_usable(sample)), {}
    for column in sample.schema:
        if column.name == target:
            continue
        if column.name not in usable:
            found[column.name] = f"is {column.type}"
        elif is_text(column.type):
            values = sample.rows[column.name].drop_null()
            distinct = pc.count_distinct(values).as_py()
            if len(values) >= FEWEST_ROWS and distinct > ALMOST_UNIQUE * len(values):
                found[column.name] = "nearly every row has a text of its own"
    return found
