"""Reading the rows of a prepared split by their ids, one row group at a time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from overproof.data.manifest import Manifest
from overproof.data.plan import Order
from overproof.data.schema import DTYPE, row_bytes, schema
from overproof.errors import InputError

Columns = dict[str, NDArray[Any]]

KEPT_BYTES = 64 << 20  # of decoded row groups: what fits is decoded once, not once an epoch
AHEAD_BYTES = 1 << 20
BATCH_COLUMNS = {"text": ("tokens", "length"), "digits": ("pixels", "label")}


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
    """Columns as arrays, without nulls; fixed-size lists and bytes become 2-D, bytes as the numbers they are."""
    return {field.name: _array(table.column(field.name).combine_chunks(), field) for field in table.schema}


def _array(values: pa.Array, field: pa.Field) -> NDArray[Any]:
    if pa.types.is_fixed_size_binary(values.type):
        stored, width = np.dtype(field.metadata[DTYPE].decode()), values.type.byte_width
        shape = (len(values), width // stored.itemsize)
        return np.ndarray(shape, stored, values.buffers()[1], values.offset * width)
    if pa.types.is_fixed_size_list(values.type):
        flat: NDArray[Any] = values.flatten().to_numpy(zero_copy_only=False)
        return flat.reshape(len(values), values.type.list_size)
    plain: NDArray[Any] = values.to_numpy(zero_copy_only=False)
    return plain


def read_group(file: pq.ParquetFile, group: int, columns: Sequence[str]) -> Columns:
    """One row group of an opened file, in file order."""
    return to_numpy(file.read_row_group(group, columns=list(columns), use_threads=False))


def read_groups(file: pq.ParquetFile, groups: list[int], columns: Sequence[str]) -> Iterator[Columns]:
    """Several row groups of an opened file, each in file order; much cheaper than one by one."""
    table = to_numpy(file.read_row_groups(groups, columns=list(columns), use_threads=False))
    begin = 0
    for group in groups:
        end = begin + file.metadata.row_group(group).num_rows
        yield {name: values[begin:end] for name, values in table.items()}
        begin = end


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
        self.columns = tuple(columns) if columns is not None else BATCH_COLUMNS[self.manifest.kind]
        known = schema(self.manifest).names
        unknown = set(self.columns) - set(known)
        if unknown:
            raise InputError(f"{root}: no column {min(unknown)!r}; expected some of {', '.join(known)}")
        self.shards = self.manifest.splits[split].shards
        self.starts = np.cumsum([0, *(shard.rows for shard in self.shards)])
        self._files: dict[int, pq.ParquetFile] = {}
        self._groups: OrderedDict[int, Columns] = OrderedDict()
        self._kept_bytes = 0

    @property
    def rows(self) -> int:
        return self.manifest.splits[self.split].rows

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": {}, "_groups": OrderedDict(), "_kept_bytes": 0}

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
        key = shard << 32 | group
        by_key = np.argsort(key, kind="stable")
        keys, begins = np.unique(key[by_key], return_index=True)
        found = self._read(keys.tolist())
        taken = {n: np.empty((len(ids), *v.shape[1:]), v.dtype) for n, v in next(iter(found.values())).items()}
        for here, columns in zip(np.split(by_key, begins[1:]), found.values(), strict=True):
            for name, values in columns.items():
                taken[name][here] = values[place[here]]
        return taken

    def steps(
        self, order: Order, batch_size: int, first: int, last: int, rank: int = 0, world: int = 1
    ) -> Iterator[Columns]:
        """A rank's planned rows of the steps ``[first, last)``, counted from 0, one step after the other.

        Some steps are read together, which costs about half of reading each alone.
        """
        share = batch_size // world
        together = max(1, AHEAD_BYTES // (share * row_bytes(schema(self.manifest, self.columns))))
        for start in range(first, last, together):
            stop = min(start + together, last)
            rows = self.take(order.steps_rows(start, stop, batch_size, rank, world))
            for step in range(stop - start):
                yield {name: values[step * share : (step + 1) * share] for name, values in rows.items()}

    def _read(self, keys: list[int]) -> dict[int, Columns]:
        """Row groups by ``shard << 32 | group``, in the order given; those not kept come from a shard at once."""
        found: dict[int, Columns] = {}
        missing: dict[int, list[int]] = {}
        for key in keys:
            if key in self._groups:
                self._groups.move_to_end(key)
                found[key] = self._groups[key]
            else:
                missing.setdefault(key >> 32, []).append(key & 0xFFFFFFFF)
        for shard, groups in missing.items():
            for group, columns in zip(groups, read_groups(self._file(shard), groups, self.columns), strict=True):
                found[shard << 32 | group] = columns
        self._keep({key: found[key] for key in keys if key not in self._groups})
        return {key: found[key] for key in keys}

    def _keep(self, groups: dict[int, Columns]) -> None:
        size = sum(map(_size, groups.values()))
        if size > KEPT_BYTES:
            return
        for key, columns in groups.items():  # copies, since what was read together lives as long as its last part
            self._groups[key] = {name: values.copy() for name, values in columns.items()}
        self._kept_bytes += size
        while self._kept_bytes > KEPT_BYTES:
            self._kept_bytes -= _size(self._groups.popitem(last=False)[1])

    def _file(self, shard: int) -> pq.ParquetFile:
        if shard not in self._files:
            expected = schema(self.manifest)
            path = self.root / self.shards[shard].path
            file = open_shard(path)
            if not file.schema_arrow.equals(expected) or _stored(file.schema_arrow) != _stored(expected):
                raise InputError(
                    f"{path}: columns are {_names(file.schema_arrow)}; expected {_names(expected)}: prepare again"
                )
            if file.metadata.num_rows != self.shards[shard].rows:
                raise InputError(
                    f"{path}: {file.metadata.num_rows} rows, the manifest says {self.shards[shard].rows}: prepare again"
                )
            self._files[shard] = file
        return self._files[shard]


def _size(columns: Columns) -> int:
    return sum(values.nbytes for values in columns.values())


def _names(found: pa.Schema) -> str:
    stored = _stored(found)
    return ", ".join(f"{f.name} {f.type}" + (f" of {stored[f.name]}" if f.name in stored else "") for f in found)


def _stored(found: pa.Schema) -> dict[str, str]:
    """The columns of bytes and the numbers they hold."""
    return {f.name: f.metadata[DTYPE].decode() for f in found if f.metadata and DTYPE in f.metadata}


def planned_shards(root: Path) -> Shards:
    """The train split with what a model reads and, to tell that it is what was planned, ``sample_id``."""
    return Shards(root, "train", planned_columns(Manifest.read(root)))


def planned_columns(manifest: Manifest) -> tuple[str, ...]:
    """The columns of ``planned_shards``."""
    return ("sample_id", *BATCH_COLUMNS[manifest.kind])
