"""Writing shards: the one place that decides what a Parquet file of this product looks like."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from overproof.data.columns import packed_dtype
from overproof.data.manifest import Shard
from overproof.files import write_file

PAGE_BYTES = 1 << 30  # more than any column of a row group


def to_table(columns: Mapping[str, NDArray[Any]], schema: pa.Schema) -> pa.Table:
    """Arrays as a table of this schema; 2-D arrays fill fixed-size lists or bytes.

    Raises:
        ValueError: a number does not fit into the bytes that the schema has for it.
    """
    arrays = []
    for field in schema:
        values = np.ascontiguousarray(columns[field.name])
        if pa.types.is_fixed_size_binary(field.type):
            arrays.append(_pack(values, field))
        elif values.ndim == 2:
            arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), type=field.type))
        else:
            arrays.append(pa.array(values, field.type))
    return pa.Table.from_arrays(arrays, schema=schema)


def _pack(values: NDArray[Any], field: pa.Field) -> pa.Array:
    dtype, shape = packed_dtype(field)
    numbers = values.astype(dtype, copy=False)
    if values.shape[1:] != shape or not np.array_equal(numbers, values, equal_nan=True):
        raise ValueError(
            f"{field.name}: values of shape {values.shape[1:]} from {values.min()} to {values.max()} in a row; "
            f"expected numbers of type {dtype} that fill {field.type}"
        )
    return pa.FixedSizeBinaryArray.from_buffers(field.type, len(values), [None, pa.py_buffer(numbers)])


def open_writer(sink: Any, schema: pa.Schema, rows_per_group: int) -> pq.ParquetWriter:
    """Writes Parquet in which each column of a row group is one page of plain values.

    They are neither compressed nor encoded, so that a reader finds every value in the mapped file.
    """
    return pq.ParquetWriter(
        sink,
        schema,
        compression="none",
        use_dictionary=False,
        write_statistics=False,
        data_page_size=PAGE_BYTES,
        max_rows_per_page=rows_per_group,
    )


def parquet_bytes(table: pa.Table, rows_per_group: int) -> bytes:
    """A Parquet file whose row groups hold ``rows_per_group`` rows; the same table gives the same bytes."""
    sink = pa.BufferOutputStream()
    with open_writer(sink, table.schema, rows_per_group) as writer:
        writer.write_table(table, row_group_size=rows_per_group)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def write_shard(
    uri: str,
    name: str,
    columns: Mapping[str, NDArray[Any]],
    schema: pa.Schema,
    rows_per_group: int,
    predictions: int | None = None,
) -> Shard:
    """Write one shard of this schema below ``uri``; returns its entry in the manifest.

    It has a prediction in each row unless ``predictions`` counts them.
    """
    table = to_table(columns, schema)
    entry = write_file(uri, name, parquet_bytes(table, rows_per_group))
    return Shard(
        path=name,
        sha256=entry.sha256,
        size_bytes=entry.size_bytes,
        rows=table.num_rows,
        predictions=table.num_rows if predictions is None else predictions,
    )
