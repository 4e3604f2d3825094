"""Rows of a Parquet file that ``parquet_writer`` wrote, by their numbers: mapped from a disk, or read by ranges where
the file lies behind a URI. Every value has one width, so that its place is arithmetic.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from overproof.artifacts import Artifact, local_folder
from overproof.data.columns import packed_dtype
from overproof.errors import InputError

PLAIN_ENCODINGS = {"PLAIN", "RLE"}  # of the values; of the levels, of which there are none
PAGE_HEADER_BYTES = 32  # at most; two pages' headers are longer
WHOLE_BYTES = 64 << 20  # a remote file that is no larger is fetched whole, and held against its hash
KEPT_BYTES = 64 << 20  # of row groups that were read by ranges, for each file
RANGES = 16  # read at a time: a bucket answers each after tens of milliseconds
Source = Path | Artifact  # a folder, or an artifact wherever it lies


def describe_source(source: Source) -> str:
    """The folder or URI, for people."""
    return source.uri if isinstance(source, Artifact) else str(source)


class RowFile(Protocol):
    """An open file."""

    def take(self, name: str, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Values of a column, by row of this file: a copy."""


def open_rows(
    source: Source, name: str, columns: Sequence[str], rows_per_group: int, check: Callable[[pq.ParquetFile], None]
) -> RowFile:
    """Open a file for these columns, once ``check`` has seen it.

    Raises:
        InputError: it is missing, was changed, is not what ``parquet_writer`` writes, or ``check`` refuses it.
    """
    if isinstance(source, Artifact) and not source.is_local and source.size_of(name) > WHOLE_BYTES:
        where, stream = f"{source.uri}: {name}", source.open(name)
        file = _open(stream, where)
        check(file)
        return RangedRows(stream, ValuePlaces.find(file, where, columns, rows_per_group))
    path = local_folder(source, name) / name
    file = open_shard(path)
    check(file)
    return MappedRows.open(path, file, columns, rows_per_group)


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
    return _open(path, str(path))


def _open(file: Path | pa.NativeFile, where: str) -> pq.ParquetFile:
    try:
        found = pq.ParquetFile(file)
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(f"{where}: {error}; expected a Parquet shard that `prepare` or `cache` wrote") from None
    refuse_objects(found.schema_arrow, where)
    return found


@dataclass(frozen=True)
class ValuePlaces:
    """Where in a file the values of some columns lie."""

    offsets: dict[str, NDArray[np.int64]]  # of a column: where the values of each row group begin
    fields: dict[str, pa.Field]
    rows_per_group: int
    spans: NDArray[np.int64]  # where the first of these columns' values of each row group begin, and the last end: G, 2

    @classmethod
    def find(cls, file: pq.ParquetFile, where: str, columns: Sequence[str], rows_per_group: int) -> ValuePlaces:
        """By the file's footer.

        Raises:
            InputError: the values are not plain ones of one page for each column of a row group.
        """
        fields = {name: file.schema_arrow.field(name) for name in columns}
        groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
        offsets, stops = {}, []
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
                    f"{where}: column {name!r} is not plain values of one page in a row group: prepare again"
                )
            offsets[name] = ends - sizes
            stops.append(ends)
        spans = np.stack([np.min(list(offsets.values()), axis=0), np.max(stops, axis=0)], axis=1)
        return cls(offsets, fields, rows_per_group, spans)

    def take(
        self, name: str, group: NDArray[np.int64], row: NDArray[np.int64], content: NDArray[np.uint8],
        starts: NDArray[np.int64] | int = 0,
    ) -> NDArray[Any]:  # fmt: skip
        """Values of a column, by row group and row in it, out of bytes of the file; ``starts`` is what to take off a
        place in the file for the place in ``content``.
        """
        (dtype, shape), width = packed_dtype(self.fields[name]), self.fields[name].type.bit_width // 8
        bytes_at = as_strided(content, (len(content) - width + 1, width), (1, 1), writeable=False)
        values: NDArray[Any] = bytes_at[self.offsets[name][group] - starts + row * width].view(dtype)
        return values.reshape(len(row), *shape)


@dataclass(frozen=True)
class MappedRows:
    """The rows of a file as they lie on the disk, mapped into memory and shared by all who read it."""

    content: NDArray[np.uint8]
    places: ValuePlaces

    @classmethod
    def open(cls, path: Path, file: pq.ParquetFile, columns: Sequence[str], rows_per_group: int) -> MappedRows:
        """Map a file; raises as ``ValuePlaces.find``."""
        return cls(np.memmap(path, np.uint8, "r"), ValuePlaces.find(file, str(path), columns, rows_per_group))

    def take(self, name: str, rows: NDArray[np.int64]) -> NDArray[Any]:
        return self.places.take(name, *np.divmod(rows, self.places.rows_per_group), self.content)


class RangedRows:
    """The rows of a file behind a URI. A row group is read whole, with the columns that lie between those asked for,
    and is kept while others have not pushed it out: its rows come one after the other in the order of training.
    """

    def __init__(self, stream: pa.NativeFile, places: ValuePlaces) -> None:
        self.stream, self.places = stream, places
        self._kept: OrderedDict[int, bytes] = OrderedDict()

    def take(self, name: str, rows: NDArray[np.int64]) -> NDArray[Any]:
        group, row = np.divmod(rows, self.places.rows_per_group)
        needed, of_row = np.unique(group, return_inverse=True)
        parts = self._read(needed.tolist())
        lengths = np.array([len(part) for part in parts])
        # A place in the file, less where its group's bytes begin there, plus where they begin in the joined ones.
        starts = self.places.spans[needed, 0] - (np.cumsum(lengths) - lengths)
        return self.places.take(name, group, row, np.frombuffer(b"".join(parts), np.uint8), starts[of_row])

    def _read(self, groups: Sequence[int]) -> list[bytes]:
        missing = [group for group in groups if group not in self._kept]
        if missing:
            with ThreadPoolExecutor(min(RANGES, len(missing))) as pool:
                self._kept |= zip(missing, pool.map(self._read_group, missing), strict=True)
        for group in groups:
            self._kept.move_to_end(group)
        parts = [self._kept[group] for group in groups]
        while len(self._kept) > len(groups) and sum(map(len, self._kept.values())) > KEPT_BYTES:
            self._kept.popitem(last=False)
        return parts

    def _read_group(self, group: int) -> bytes:
        start, stop = self.places.spans[group].tolist()
        content: bytes = self.stream.read_at(stop - start, start)
        if len(content) != stop - start:
            raise InputError(f"row group {group}: {len(content)} bytes of {stop - start}; the file became shorter")
        return content
