"""Columns of Parquet files that others wrote: the asked ones alone are read, and as plain values.

A column of an extension type that is asked for is read where its storage is text; what a stranger pickled never is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from overproof.data.row_files import refuse_objects
from overproof.data.source_files import UnreadableFile, naming_faults

PARQUET = "Parquet"


def open_parquet(handle: Any) -> pq.ParquetFile:
    """A Parquet file, whose pages are held against their checksums where it has any."""
    return pq.ParquetFile(handle, page_checksum_verification=True)


def iter_columns(handle: Any, path: str, columns: Sequence[str], **settings: Any) -> Iterator[pa.RecordBatch]:
    """Batches of some columns of an open file, in the order they were asked for; the others are not read.

    Raises:
        UnreadableFile: the file is damaged, or several columns have one of the names.
        InputError: a column holds objects.
    """
    with naming_faults(path, PARQUET):
        file = open_parquet(handle)
        schema = file.schema_arrow
        require_plain(schema, columns, path)
        for batch in file.iter_batches(columns=list(columns), **settings):
            plain = [_plain(batch.column(batch.schema.get_field_index(name))) for name in columns]
            yield pa.RecordBatch.from_arrays(plain, names=list(columns))


def read_table(handle: Any, path: str, columns: Sequence[str]) -> pa.Table:
    """Some columns of an open file as a whole. Columns that hold no text stay what they are.

    Raises:
        InputError: as ``iter_columns``.
    """
    with naming_faults(path, PARQUET):
        file = open_parquet(handle)
        require_plain(file.schema_arrow, columns, path)
        table = file.read(columns=list(columns))
        for number, column in enumerate(table.columns):
            kind = as_plain_type(column.type)
            if kind != column.type and (is_text(kind) or pa.types.is_run_end_encoded(column.type)):
                plain = pa.chunked_array([_plain(chunk) for chunk in column.chunks], kind)
                table = table.set_column(number, table.column_names[number], plain)
        return table


def require_plain(schema: pa.Schema, columns: Sequence[str], path: str) -> None:
    """
    Raises:
        InputError: a column that is asked for is not one alone, or holds objects.
    """
    require_one_each(schema.names, columns, path)
    refuse_objects(pa.schema([f for f in schema if f.name in columns and not is_text(as_plain_type(f.type))]), path)


def require_one_each(names: Sequence[str], columns: Sequence[str], path: str) -> None:
    """
    Raises:
        UnreadableFile: several columns have one of the names that are asked for.
    """
    twice = next((name for name in columns if list(names).count(name) > 1), None)
    if twice is not None:
        raise UnreadableFile(
            f"{path}: several columns are named {twice!r}; expected a name of its own for each",
            "several columns of one name",
        )


def as_plain_type(kind: pa.DataType) -> pa.DataType:
    """The type that ``iter_columns`` gives values of a type in: texts of every kind are one, categories what they
    stand for.
    """
    if isinstance(kind, pa.BaseExtensionType):
        return as_plain_type(kind.storage_type)
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return as_plain_type(kind.value_type)
    if pa.types.is_string_view(kind):
        return pa.large_string()
    if pa.types.is_list(kind) and not isinstance(kind.value_type, pa.BaseExtensionType):
        return pa.list_(as_plain_type(kind.value_type))
    return pa.large_binary() if pa.types.is_binary_view(kind) else kind


def is_text(kind: pa.DataType) -> bool:
    """Whether a plain column holds text."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _plain(values: pa.Array) -> pa.Array:
    if isinstance(values.type, pa.BaseExtensionType):
        return _plain(values.storage)
    if pa.types.is_run_end_encoded(values.type):
        return _plain(pc.run_end_decode(values))
    wanted = as_plain_type(values.type)
    return values if values.type == wanted else values.cast(wanted)
