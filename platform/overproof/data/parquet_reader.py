"""Reading the rows of a prepared split by their ids, straight from its files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from overproof.data.columns import DTYPE, packed_dtype, row_bytes
from overproof.data.manifest import SAMPLE_ID, Manifest
from overproof.data.order import Order
from overproof.data.row_files import RowFile, Source, describe_source, open_rows
from overproof.errors import InputError

Columns = dict[str, NDArray[Any]]

READ_AHEAD_BYTES = 1 << 20


def table_to_numpy(table: pa.Table) -> Columns:
    """Columns as arrays, without nulls; fixed-size lists and bytes become 2-D, bytes as the numbers they are."""
    return {field.name: _to_numpy(table.column(field.name).combine_chunks(), field) for field in table.schema}


def _to_numpy(values: pa.Array, field: pa.Field) -> NDArray[Any]:
    if pa.types.is_fixed_size_binary(values.type):
        dtype, shape = packed_dtype(field)
        return np.ndarray((len(values), *shape), dtype, values.buffers()[1], values.offset * values.type.byte_width)
    if pa.types.is_fixed_size_list(values.type):
        flat: NDArray[Any] = values.flatten().to_numpy(zero_copy_only=False)
        return flat.reshape(len(values), values.type.list_size)
    plain: NDArray[Any] = values.to_numpy(zero_copy_only=False)
    return plain


class Shards:
    """The rows of one split by ``sample_id``. Picklable: a copy opens the files again."""

    def __init__(self, source: Source, split: str, columns: Sequence[str] | None = None) -> None:
        """Columns default to those a model reads. Those of a remote artifact are read where they lie.

        Raises:
            InputError: no manifest, no such split or column.
        """
        self.source, self.split, self.where = source, split, describe_source(source)
        self.manifest = Manifest.read(source)
        if split not in self.manifest.splits:
            raise InputError(f"{self.where}: no split {split!r}; expected one of {', '.join(self.manifest.splits)}")
        self.columns = tuple(columns) if columns is not None else self.manifest.batch_columns
        known = self.manifest.schema.names
        unknown = set(self.columns) - set(known)
        if unknown:
            raise InputError(f"{self.where}: no column {min(unknown)!r}; expected some of {', '.join(known)}")
        self.shards = self.manifest.splits[split].shards
        self.first_rows = np.cumsum([0, *(shard.rows for shard in self.shards)])
        self._open: dict[int, RowFile] = {}

    @property
    def rows(self) -> int:
        return self.manifest.splits[self.split].rows

    @property
    def schema(self) -> pa.Schema:
        """Of the columns that are read."""
        return pa.schema([self.manifest.schema.field(name) for name in self.columns])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}

    def take(self, sample_ids: NDArray[np.int64]) -> Columns:
        """The rows with these ids, in the order given; lists are 2-D.

        Raises:
            InputError: an id is out of range, or a shard is not what the manifest says.
        """
        ids = np.asarray(sample_ids, np.int64)
        if ids.size == 0:
            raise InputError(f"{self.where}/{self.split}: no rows were asked for; expected at least one id")
        if ids.min() < 0 or ids.max() >= self.rows:
            raise InputError(
                f"{self.where}/{self.split}: row {ids.min() if ids.min() < 0 else ids.max()} was asked for; "
                f"expected 0 to {self.rows - 1}"
            )
        shard_of_row = np.searchsorted(self.first_rows, ids, side="right") - 1
        rows: Columns = {}
        for number in np.unique(shard_of_row):
            in_shard = np.flatnonzero(shard_of_row == number)
            file = self._open_shard(int(number))
            for name in self.columns:
                values = file.take(name, ids[in_shard] - self.first_rows[number])
                if len(in_shard) == len(ids):
                    rows[name] = values
                else:
                    rows.setdefault(name, np.empty((len(ids), *values.shape[1:]), values.dtype))[in_shard] = values
        return rows

    def steps(
        self, order: Order, batch_size: int, first: int, last: int, rank: int = 0, world: int = 1
    ) -> Iterator[Columns]:
        """A rank's planned rows of the steps ``[first, last)``, counted from 0, one step after the other.

        Some steps are read together, which costs less than reading each alone.
        """
        share = batch_size // world
        steps_per_read = max(1, READ_AHEAD_BYTES // (share * row_bytes(self.schema)))
        for start in range(first, last, steps_per_read):
            stop = min(start + steps_per_read, last)
            rows = self.take(order.steps_rows(start, stop, batch_size, rank, world))
            for step in range(stop - start):
                yield {name: values[step * share : (step + 1) * share] for name, values in rows.items()}

    def _open_shard(self, number: int) -> RowFile:
        if number not in self._open:
            expected, shard = self.manifest.schema, self.shards[number]

            def check(file: pq.ParquetFile) -> None:
                found, path = file.schema_arrow, f"{self.where}/{shard.path}"
                if not found.equals(expected) or _packed_dtypes(found) != _packed_dtypes(expected):
                    raise InputError(
                        f"{path}: columns are {_describe(found)}; expected {_describe(expected)}: prepare again"
                    )
                if file.metadata.num_rows != shard.rows:
                    raise InputError(
                        f"{path}: {file.metadata.num_rows} rows, the manifest says {shard.rows}: prepare again"
                    )

            self._open[number] = open_rows(self.source, shard.path, self.columns, self.manifest.rows_per_group, check)
        return self._open[number]


def _describe(schema: pa.Schema) -> str:
    dtypes = _packed_dtypes(schema)
    return ", ".join(f"{f.name} {f.type}" + (f" of {dtypes[f.name]}" if f.name in dtypes else "") for f in schema)


def _packed_dtypes(schema: pa.Schema) -> dict[str, str]:
    """The columns of packed numbers and the type of each; Arrow's comparison of schemas leaves it out."""
    return {f.name: f.metadata[DTYPE].decode() for f in schema if f.metadata and DTYPE in f.metadata}


def planned_shards(source: Source) -> Shards:
    """The train split with what a model reads and, to tell that it is what was planned, ``sample_id``."""
    return Shards(source, "train", planned_columns(Manifest.read(source)))


def planned_columns(manifest: Manifest) -> tuple[str, ...]:
    """The columns of ``planned_shards``."""
    return (SAMPLE_ID, *manifest.batch_columns)
