"""Reading the rows of a prepared split by their ids, one row group at a time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from overproof.data.manifest import Manifest
from overproof.errors import InputError

Columns = dict[str, NDArray[Any]]

GROUPS_KEPT = 8
COLUMNS = {
    "text": ("sample_id", "document", "tokens", "length"),
    "digits": ("sample_id", "pixels", "label"),
}
BATCH_COLUMNS = {"text": ("tokens", "length"), "digits": ("pixels", "label")}


def schema(kind: str, sequence_length: int | None) -> pa.Schema:
    """The columns of a shard; none may be null."""
    if kind == "text":
        assert sequence_length is not None
        types = [pa.int64(), pa.int32(), pa.list_(pa.int32(), sequence_length + 1), pa.int32()]
    else:
        types = [pa.int64(), pa.list_(pa.float32(), 64), pa.int32()]
    return pa.schema([pa.field(n, t, nullable=False) for n, t in zip(COLUMNS[kind], types, strict=True)])


def refuse_objects(found: pa.Schema, where: str) -> None:
    """Refuse a schema that holds an extension type: reading one may unpickle, and so run, what a stranger wrote.

    Raises:
        InputError: naming the column.
    """
    for field in found:
        if _is_extension(field):
            raise InputError(
                f"{where}: column {field.name!r} holds objects ({_extension_name(field)}); expected plain numbers, "
                "strings or lists of them: write the file again without that column"
            )


def _is_extension(field: pa.Field) -> bool:
    # A type nobody registered arrives as its storage, with the name in the field's metadata.
    if isinstance(field.type, pa.BaseExtensionType) or b"ARROW:extension:name" in (field.metadata or {}):
        return True
    return any(_is_extension(field.type.field(i)) for i in range(field.type.num_fields))


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


def to_numpy(table: pa.Table) -> Columns:
    """Columns as arrays, without nulls; fixed-size lists become 2-D."""
    return {name: _array(table.column(name).combine_chunks()) for name in table.column_names}


def _array(values: pa.Array) -> NDArray[Any]:
    if pa.types.is_fixed_size_list(values.type):
        flat: NDArray[Any] = values.flatten().to_numpy(zero_copy_only=False)
        return flat.reshape(len(values), values.type.list_size)
    plain: NDArray[Any] = values.to_numpy(zero_copy_only=False)
    return plain


def read_group(file: pq.ParquetFile, group: int, columns: Sequence[str]) -> Columns:
    """One row group of an opened file, in file order."""
    return to_numpy(file.read_row_group(group, columns=list(columns), use_threads=False))


class Shards:
    """The rows of one split by ``sample_id``. Picklable: what it opened stays behind."""

    def __init__(self, root: Path, split: str, columns: Sequence[str] | None = None) -> None:
        """Columns default to those a model reads.

        Raises:
            InputError: no manifest, no such split or column.
        """
        self.root, self.split = Path(root), split
        self.manifest = Manifest.read(self.root)
        if split not in self.manifest.splits:
            raise InputError(f"{root}: no split {split!r}; expected one of {', '.join(self.manifest.splits)}")
        kind = self.manifest.kind
        self.columns = tuple(columns) if columns is not None else BATCH_COLUMNS[kind]
        unknown = set(self.columns) - set(COLUMNS[kind])
        if unknown:
            raise InputError(f"{root}: no column {min(unknown)!r}; expected some of {', '.join(COLUMNS[kind])}")
        self.shards = self.manifest.splits[split].shards
        self.starts = np.cumsum([0, *(shard.rows for shard in self.shards)])
        self._files: dict[int, pq.ParquetFile] = {}
        self._groups: OrderedDict[tuple[int, int], Columns] = OrderedDict()

    @property
    def rows(self) -> int:
        return self.manifest.splits[self.split].rows

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": {}, "_groups": OrderedDict()}

    def take(self, sample_ids: NDArray[np.int64]) -> Columns:
        """The rows with these ids, in the order given; lists are 2-D.

        Raises:
            InputError: an id is out of range, or a shard is not what the manifest says.
        """
        ids = np.asarray(sample_ids, np.int64)
        if ids.size == 0:
            raise InputError(f"{self.root}/{self.split}: no rows were asked for")
        if ids.min() < 0 or ids.max() >= self.rows:
            raise InputError(
                f"{self.root}/{self.split}: row {ids.min() if ids.min() < 0 else ids.max()} was asked for; "
                f"expected 0 to {self.rows - 1}"
            )
        shard = np.searchsorted(self.starts, ids, side="right") - 1
        group, place = np.divmod(ids - self.starts[shard], self.manifest.rows_per_group)
        keys = np.stack([shard, group], axis=1)
        taken: Columns = {}
        for key in np.unique(keys, axis=0):
            here = np.flatnonzero((keys == key).all(axis=1))
            for name, values in self._group(int(key[0]), int(key[1])).items():
                out = taken.setdefault(name, np.empty((len(ids), *values.shape[1:]), values.dtype))
                out[here] = values[place[here]]
        return taken

    def _group(self, shard: int, group: int) -> Columns:
        key = (shard, group)
        if key not in self._groups:
            self._groups[key] = read_group(self._file(shard), group, self.columns)
            if len(self._groups) > GROUPS_KEPT:
                self._groups.popitem(last=False)
        self._groups.move_to_end(key)
        return self._groups[key]

    def _file(self, shard: int) -> pq.ParquetFile:
        if shard not in self._files:
            expected = schema(self.manifest.kind, self.manifest.sequence_length)
            path = self.root / self.shards[shard].path
            file = open_shard(path)
            if not file.schema_arrow.equals(expected):
                raise InputError(
                    f"{path}: columns are {_names(file.schema_arrow)}; expected {_names(expected)}: prepare again"
                )
            if file.metadata.num_rows != self.shards[shard].rows:
                raise InputError(
                    f"{path}: {file.metadata.num_rows} rows, the manifest says {self.shards[shard].rows}: prepare again"
                )
            self._files[shard] = file
        return self._files[shard]


def _names(found: pa.Schema) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in found)
