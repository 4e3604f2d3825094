"""Reading the rows of a prepared split by their ids, straight from the mapped files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from overproof.data.columns import DTYPE, packed_dtype, row_bytes
from overproof.data.manifest import SAMPLE_ID, Manifest
from overproof.data.order import Order
from overproof.errors import InputError

Columns = dict[str, NDArray[Any]]

READ_AHEAD_BYTES = 1 << 20
PLAIN_ENCODINGS = {"PLAIN", "RLE"}  # of the values; of the levels, of which there are none
PAGE_HEADER_BYTES = 32  # at most; two pages' headers are longer


def refuse_objects(schema: pa.Schema, where: str) -> None:
    """Refuse a schema that holds a type of a stranger's: reading one may unpickle, and so run, what they wrote. Arrow's
    own extension types (such as ``arrow.uuid``) are plain values.

    Raises:
        InputError: naming the column.
    """
    for field in schema:
        if holds_objects(field):
            raise InputError(
                f"{where}: column {field.name!r} holds objects ({_extension_name(field)}); expected plain numbers, "
                "strings or lists of them: write the file again without that column"
            )


def holds_objects(field: pa.Field) -> bool:
    """Whether a column is of an extension type that is not Arrow's own, or holds values of one."""
    if isinstance(field.type, pa.ExtensionType):
        return True
    if isinstance(field.type, pa.BaseExtensionType):
        return False
    # A type nobody registered arrives as its storage, with the name in the field's metadata.
    named = b"ARROW:extension:name" in (field.metadata or {})
    return named or any(holds_objects(field.type.field(i)) for i in range(field.type.num_fields))


def _extension_name(field: pa.Field) -> str:
    if isinstance(field.type, pa.BaseExtensionType):
        return str(field.type)
    name: bytes = (field.metadata or {}).get(b"ARROW:extension:name", str(field.type).encode())
    return name.decode()


def open_shard(path: Path) -> pq.ParquetFile:
    """Open a Parquet file that holds no objects.

    Raises:
        InputError: it is missing, not Parquet, or holds an extension column.
    """
    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(f"{path}: {error}; expected a Parquet shard that `prepare` or `cache` wrote") from None
    refuse_objects(file.schema_arrow, str(path))
    return file


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


@dataclass(frozen=True)
class MappedShard:
    """The rows of one shard as they lie in the file, which is mapped into memory and shared by all who read it."""

    content: NDArray[np.uint8]
    offsets: dict[str, NDArray[np.int64]]  # of a column: where in the file the values of each row group begin
    fields: dict[str, pa.Field]
    rows_per_group: int

    @classmethod
    def open(cls, path: Path, file: pq.ParquetFile, columns: Sequence[str], rows_per_group: int) -> MappedShard:
        """Map a file that ``parquet_writer`` wrote and find the values in it.

        Raises:
            InputError: the values are not plain ones of one page for each column of a row group.
        """
        fields = {name: file.schema_arrow.field(name) for name in columns}
        groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
        offsets = {}
        for name, field in fields.items():
            index, width = file.schema_arrow.get_field_index(name), field.type.bit_width // 8
            chunks = [group.column(index) for group in groups]
            sizes = np.array([group.num_rows for group in groups], np.int64) * width
            begins = np.array([chunk.data_page_offset for chunk in chunks], np.int64)
            ends = begins + np.array([chunk.total_compressed_size for chunk in chunks], np.int64)
            plain = all(c.compression == "UNCOMPRESSED" and set(c.encodings) <= PLAIN_ENCODINGS for c in chunks)
            headers = ends - begins - sizes
            if not plain or (headers <= 0).any() or (headers > PAGE_HEADER_BYTES).any():
                raise InputError(
                    f"{path}: column {name!r} is not plain values of one page in a row group: prepare again"
                )
            offsets[name] = ends - sizes
        return cls(np.memmap(path, np.uint8, "r"), offsets, fields, rows_per_group)

    def take(self, name: str, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Values of a column, by row of this shard: a copy."""
        (dtype, shape), width = packed_dtype(self.fields[name]), self.fields[name].type.bit_width // 8
        group, row_in_group = np.divmod(rows, self.rows_per_group)
        bytes_at = as_strided(self.content, (len(self.content) - width + 1, width), (1, 1), writeable=False)
        values: NDArray[Any] = bytes_at[self.offsets[name][group] + row_in_group * width].view(dtype)
        return values.reshape(len(rows), *shape)


class Shards:
    """The rows of one split by ``sample_id``. Picklable: a copy maps the files again."""

    def __init__(self, root: Path, split: str, columns: Sequence[str] | None = None) -> None:
        """Columns default to those a model reads.

        Raises:
            InputError: no manifest, no such split or column.
        """
        self.root, self.split = Path(root), split
        self.manifest = Manifest.read(self.root)
        if split not in self.manifest.splits:
            raise InputError(f"{root}: no split {split!r}; expected one of {', '.join(self.manifest.splits)}")
        self.columns = tuple(columns) if columns is not None else self.manifest.batch_columns
        known = self.manifest.schema.names
        unknown = set(self.columns) - set(known)
        if unknown:
            raise InputError(f"{root}: no column {min(unknown)!r}; expected some of {', '.join(known)}")
        self.shards = self.manifest.splits[split].shards
        self.first_rows = np.cumsum([0, *(shard.rows for shard in self.shards)])
        self._mapped: dict[int, MappedShard] = {}

    @property
    def rows(self) -> int:
        return self.manifest.splits[self.split].rows

    @property
    def schema(self) -> pa.Schema:
        """Of the columns that are read."""
        return pa.schema([self.manifest.schema.field(name) for name in self.columns])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_mapped": {}}

    def take(self, sample_ids: NDArray[np.int64]) -> Columns:
        """The rows with these ids, in the order given; lists are 2-D.

        Raises:
            InputError: an id is out of range, or a shard is not what the manifest says.
        """
        ids = np.asarray(sample_ids, np.int64)
        if ids.size == 0:
            raise InputError(f"{self.root}/{self.split}: no rows were asked for; expected at least one id")
        if ids.min() < 0 or ids.max() >= self.rows:
            raise InputError(
                f"{self.root}/{self.split}: row {ids.min() if ids.min() < 0 else ids.max()} was asked for; "
                f"expected 0 to {self.rows - 1}"
            )
        shard_of_row = np.searchsorted(self.first_rows, ids, side="right") - 1
        rows: Columns = {}
        for number in np.unique(shard_of_row):
            in_shard = np.flatnonzero(shard_of_row == number)
            mapped = self._open_mapped(int(number))
            for name in self.columns:
                values = mapped.take(name, ids[in_shard] - self.first_rows[number])
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

    def _open_mapped(self, number: int) -> MappedShard:
        if number not in self._mapped:
            expected, shard = self.manifest.schema, self.shards[number]
            path = self.root / shard.path
            file = open_shard(path)
            if not file.schema_arrow.equals(expected) or _packed_dtypes(file.schema_arrow) != _packed_dtypes(expected):
                raise InputError(
                    f"{path}: columns are {_describe(file.schema_arrow)}; expected {_describe(expected)}: prepare again"
                )
            if file.metadata.num_rows != shard.rows:
                raise InputError(
                    f"{path}: {file.metadata.num_rows} rows, the manifest says {shard.rows}: prepare again"
                )
            self._mapped[number] = MappedShard.open(path, file, self.columns, self.manifest.rows_per_group)
        return self._mapped[number]


def _describe(schema: pa.Schema) -> str:
    dtypes = _packed_dtypes(schema)
    return ", ".join(f"{f.name} {f.type}" + (f" of {dtypes[f.name]}" if f.name in dtypes else "") for f in schema)


def _packed_dtypes(schema: pa.Schema) -> dict[str, str]:
    """The columns of packed numbers and the type of each; Arrow's comparison of schemas leaves it out."""
    return {f.name: f.metadata[DTYPE].decode() for f in schema if f.metadata and DTYPE in f.metadata}


def planned_shards(root: Path) -> Shards:
    """The train split with what a model reads and, to tell that it is what was planned, ``sample_id``."""
    return Shards(root, "train", planned_columns(Manifest.read(root)))


def planned_columns(manifest: Manifest) -> tuple[str, ...]:
    """The columns of ``planned_shards``."""
    return (SAMPLE_ID, *manifest.batch_columns)
