"""What the tasks of one stage hand to each other: rows by part, through files of the store that every node sees.

Each task writes runs: a run holds rows of every part, part after part, behind the places where they begin. Whoever
works on a part reads its rows of all runs by ranges. So there are as many files as tasks, whatever the number of parts,
and the process that starts the tasks holds their names alone; a node that is lost takes nothing with it. K parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import DTypeLike, NDArray

from overproof.files import filesystem, write_file

RUN_BYTES = 64 << 20  # of rows that a task holds before it writes them
RANGES = 16  # read at a time: a bucket answers each after tens of milliseconds
BATCH_BYTES = 8 << 20  # of a table read at once
PLACE = np.dtype("<i8")
PACKED = pa.ipc.IpcWriteOptions(compression="lz4")


class RunWriter:
    """Writes rows by part, a run whenever many are held."""

    def __init__(self, uri: str, name: str, parts: int) -> None:
        self.runs: list[str] = []  # names below ``uri``
        self._uri, self._name, self._parts = uri, name, parts
        self._tables: list[pa.Table] = []
        self._part_R: list[NDArray[np.int64]] = []
        self._held_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is None and self._tables:
            self._write()

    def add(self, table: pa.Table, part_R: NDArray[np.int64]) -> None:
        """Take rows, and the part of each."""
        if len(table):
            self._tables.append(table)
            self._part_R.append(part_R)
            self._held_bytes += table.nbytes
        if self._held_bytes >= RUN_BYTES:
            self._write()

    def _write(self) -> None:
        part_R = np.concatenate(self._part_R)
        order = np.argsort(part_R, kind="stable")
        table = pa.concat_tables(self._tables).take(order)
        rows = np.searchsorted(part_R[order], np.arange(self._parts + 1)).tolist()
        contents = [
            _packed(table.slice(first, last - first)) if last > first else b"" for first, last in pairwise(rows)
        ]
        places = np.cumsum([PLACE.itemsize * (self._parts + 1), *map(len, contents)], dtype=PLACE)
        name = f"{self._name}-{len(self.runs)}"
        write_file(self._uri, name, b"".join([places.tobytes(), *contents]))
        self.runs.append(name)
        self._tables, self._part_R, self._held_bytes = [], [], 0


def _packed(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=PACKED) as writer:
        writer.write_table(table.combine_chunks())
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]


def read_part(uri: str, runs: Sequence[str], part: int, schema: pa.Schema) -> pa.Table:
    """The rows of a part, in no order that means anything."""
    files, root = filesystem(uri)

    def read(name: str) -> pa.Table | None:
        with files.open_input_file(f"{root}/{name}") as file:
            start, stop = np.frombuffer(file.read_at(2 * PLACE.itemsize, part * PLACE.itemsize), PLACE).tolist()
            if start == stop:
                return None
            return pa.ipc.open_stream(file.read_at(stop - start, start)).read_all()

    with ThreadPoolExecutor(RANGES) as pool:
        found = [table for table in pool.map(read, runs) if table is not None]
    return pa.concat_tables([schema.empty_table(), *found])


# --- tables ---------------------------------------------------------------------------------------


def write_table(uri: str, name: str, table: pa.Table, bytes_R: NDArray[np.int64]) -> None:
    """A table that is read again in batches of about ``BATCH_BYTES``, by the bytes of each row."""
    files, root = filesystem(uri)
    batch_R = (np.cumsum(bytes_R) - bytes_R) // BATCH_BYTES
    borders = [0, *(np.flatnonzero(np.diff(batch_R)) + 1).tolist(), len(table)]
    with (
        files.open_output_stream(f"{root}/{name}") as stream,
        pa.ipc.new_file(stream, table.schema, options=PACKED) as writer,
    ):
        for first, last in pairwise(borders):
            writer.write_table(table.slice(first, last - first).combine_chunks())


def iter_table(uri: str, name: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Some columns of a table, a batch at a time; the others are not read."""
    files, root = filesystem(uri)
    with files.open_input_file(f"{root}/{name}") as file:
        schema = pa.ipc.open_file(file).schema
        fields = [schema.get_field_index(column) for column in columns]
        found = pa.ipc.open_file(file, options=pa.ipc.IpcReadOptions(included_fields=fields))
        for number in range(found.num_record_batches):
            yield found.get_batch(number).select(list(columns))


# --- tapes ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tape:
    """A file of values of one width and nothing else."""

    name: str
    count: int


class TapeWriter:
    """Writes files of values, each begun with its first ones; none where there are none."""

    def __init__(self, uri: str) -> None:
        self._files, self._root = filesystem(uri)
        self._streams: dict[str, pa.NativeFile] = {}
        self.counts: dict[str, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for stream in self._streams.values():
            stream.close()

    def write(self, name: str, values: NDArray[Any]) -> None:
        """Append values to a file."""
        if name not in self._streams:
            self._streams[name] = self._files.open_output_stream(f"{self._root}/{name}")
            self.counts[name] = 0
        self._streams[name].write(np.ascontiguousarray(values))
        self.counts[name] += len(values)

    @property
    def tapes(self) -> Mapping[str, Tape]:
        return {name: Tape(name, count) for name, count in self.counts.items()}


def read_tapes(uri: str, tapes: Sequence[Tape], dtype: DTypeLike, start: int, stop: int) -> NDArray[Any]:
    """The values ``[start, stop)`` of tapes that follow each other."""
    files, root = filesystem(uri)
    values = np.empty(stop - start, dtype)
    width, first = values.dtype.itemsize, 0
    for tape in tapes:
        own = slice(max(start - first, 0), min(stop - first, tape.count))
        if own.start < own.stop:
            with files.open_input_file(f"{root}/{tape.name}") as file:
                content = file.read_at((own.stop - own.start) * width, own.start * width)
            values[first + own.start - start : first + own.stop - start] = np.frombuffer(content, dtype)
        first += tape.count
    return values
