"""What `overproof shrink` sees of data before their task is known, and what a task makes of it.

Nothing is read whole: of each kind of table the first rows of one file.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import pyarrow as pa
from pyarrow import csv, fs, json
from pyarrow import parquet as pq

from overproof.data.parquet_reader import refuse_objects
from overproof.errors import InputError
from overproof.files import absolute_uri, filesystem

SAMPLE_ROWS = 10_000
SAMPLE_BYTES = 4 << 20  # of a text file, read for its first rows
TABLES = (".csv", ".jsonl", ".parquet")
LISTED = 12  # columns, in a message


@dataclass(frozen=True)
class TableSample:
    """The first rows of the tables of one kind. Columns of bytes and nested ones are in the schema alone.

    Categories are so in the schema; among the rows they are what they stand for.
    """

    schema: pa.Schema
    rows: pa.Table
    total_rows: int  # of all files: exact for Parquet, else by their sizes

    def columns(self, *tests: Any) -> list[str]:
        """Names of the columns whose type passes one of the tests, such as ``pa.types.is_string``."""
        return [column.name for column in self.schema if any(test(column.type) for test in tests)]

    @property
    def listed(self) -> str:
        """The columns, for a message."""
        names = [f"{column.name} ({column.type})" for column in self.schema]
        return ", ".join(names[:LISTED]) + (", ..." if len(names) > LISTED else "")


@dataclass(frozen=True)
class DataLook:
    """A file or folder, looked at."""

    path: str  # absolute, or a URI
    single: bool  # it is one file
    files: Mapping[str, int]  # how many files end so, in lower case: {".csv": 2}
    size_bytes: Mapping[str, int]  # of those
    names: tuple[str, ...]  # of the files, from the folder on
    tables: Mapping[str, TableSample]  # by suffix

    @property
    def described(self) -> str:
        """What lies there, for a message."""
        return ", ".join(f"{count:,} {suffix or 'without a suffix'}" for suffix, count in self.files.items())


@dataclass(frozen=True)
class ColumnFlags:
    """What the command line says of the data; None leaves it to be found out."""

    label: str | None = None
    text: str | None = None
    image: str | None = None
    pattern: str | None = None
    image_size: int | None = None


@dataclass(frozen=True)
class Fit:
    """The data are for the task: what its recipe says of them."""

    data: Mapping[str, Any]  # fields of the recipe's section, `kind` and how rows are split left out
    rows: int  # about how many rows a model reads
    units: int  # about how many documents, images or rows are split into train, validation and test
    reasons: Mapping[str, str]  # what was chosen, and why
    values: Mapping[str, Any] = field(default_factory=dict)  # further names that the template may use
    refit: str | None = None  # why a given teacher cannot be taken as it is, where it has to learn first


@dataclass(frozen=True)
class Misfit:
    """The data are not for the task."""

    why: str


@dataclass(frozen=True)
class Question:
    """The data may be for the task, and something must be said first."""

    flag: str
    text: str


Recognised = Fit | Misfit | Question


@runtime_checkable
class Shrinkable(Protocol):
    """What a task has beside, for `overproof shrink` to find and start it."""

    template: str  # a file in `tasks/templates`

    def recognise(self, look: DataLook, model: Mapping[str, Any] | None, flags: ColumnFlags) -> Recognised:
        """Whether data are for the task. ``model`` is the given teacher's config.json, None where one is trained."""


def look_at(path: str) -> DataLook:
    """List what lies at a path, and read the first rows of its tables.

    Raises:
        InputError: there is nothing, or a table is not what its name says.
    """
    files, root = filesystem(path)
    info = files.get_file_info(root)
    if info.type == fs.FileType.NotFound:
        raise InputError(f"--data {path}: no such file or folder; expected text, JSONL, Parquet, CSV or images")
    single = info.type == fs.FileType.File
    listing = [info] if single else files.get_file_info(fs.FileSelector(root, recursive=True))
    found = sorted(
        (i for i in listing if i.type == fs.FileType.File and not i.base_name.startswith(".")), key=lambda i: i.path
    )
    if not found or not any(i.size for i in found):
        raise InputError(f"--data {path}: is empty; expected text, JSONL, Parquet, CSV or images")
    by_suffix: dict[str, list[fs.FileInfo]] = {}
    for each in found:
        by_suffix.setdefault(f".{each.extension.lower()}" if each.extension else "", []).append(each)
    return DataLook(
        absolute_uri(path),
        single,
        dict(Counter({suffix: len(own) for suffix, own in by_suffix.items()}).most_common()),
        {suffix: sum(i.size for i in own) for suffix, own in by_suffix.items()},
        tuple(i.path.removeprefix(root).strip("/") or i.base_name for i in found),
        {suffix: _sample(files, by_suffix[suffix], suffix) for suffix in TABLES if suffix in by_suffix},
    )


def _sample(files: fs.FileSystem, infos: list[fs.FileInfo], suffix: str) -> TableSample:
    first = next((i for i in infos if i.size), None)
    if first is None:
        raise InputError(f"--data: {infos[0].path}: is empty; expected rows")
    if suffix == ".parquet":
        return _parquet_sample(files, infos)
    try:
        with files.open_input_stream(first.path) as stream:
            content = stream.read(SAMPLE_BYTES)
        if len(content) < first.size and b"\n" in content:
            content = content[: content.rindex(b"\n") + 1]
        reader, options = (csv.read_csv, csv.ReadOptions) if suffix == ".csv" else (json.read_json, json.ReadOptions)
        rows = reader(io.BytesIO(content), read_options=options(block_size=SAMPLE_BYTES))  # a row lies in one block
        _require_distinct(rows.schema.names, first.path)
    except UnicodeDecodeError as error:
        raise InputError(f"--data: {first.path}: not UTF-8: {error}; expected text in UTF-8") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"--data: {first.path}: not {suffix[1:]}: {error}; expected rows in columns") from None
    if not rows.num_rows:
        raise InputError(f"--data: {first.path}: has a header and no rows; expected some")
    total = round(rows.num_rows * sum(i.size for i in infos) / len(content))
    return TableSample(rows.schema, _plain(rows.slice(0, SAMPLE_ROWS)), max(total, rows.num_rows))


def _parquet_sample(files: fs.FileSystem, infos: list[fs.FileInfo]) -> TableSample:
    total, rows, schema = 0, None, None
    for info in infos:
        try:
            with files.open_input_file(info.path) as handle:
                file = pq.ParquetFile(handle)
                refuse_objects(file.schema_arrow, info.path)
                _require_distinct(file.schema_arrow.names, info.path)
                total += file.metadata.num_rows
                if rows is None and file.metadata.num_rows:
                    schema = file.schema_arrow
                    plain = [column.name for column in schema if _is_plain(column.type)]
                    rows = pa.Table.from_batches([next(file.iter_batches(batch_size=SAMPLE_ROWS, columns=plain))])
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(f"--data: {info.path}: not parquet: {error}; expected rows in columns") from None
    if rows is None or schema is None:
        raise InputError(f"--data: {infos[0].path}: has no rows; expected some")
    return TableSample(schema, _decoded(rows), total)


def _require_distinct(names: list[str], path: str) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise InputError(f"--data: {path}: several columns are named {twice[0]!r}; expected a name of its own for each")


def _plain(rows: pa.Table) -> pa.Table:
    return rows.select([column.name for column in rows.schema if _is_plain(column.type)])


def _decoded(rows: pa.Table) -> pa.Table:
    """Categories as what they stand for: not all that counts values takes them as Arrow stores them."""
    for number, column in enumerate(rows.schema):
        if pa.types.is_dictionary(column.type):
            rows = rows.set_column(number, column.name, rows.column(number).cast(column.type.value_type))
    return rows


def _is_plain(kind: pa.DataType) -> bool:
    return not (pa.types.is_nested(kind) or is_bytes(kind))


def is_bytes(kind: pa.DataType) -> bool:
    """Whether a column holds bytes that are no text."""
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def is_text(kind: pa.DataType) -> bool:
    """Whether a column holds text."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def choose_column(
    sample: TableSample, asked: str | None, flag: str, usual: tuple[str, ...], possible: list[str], what: str
) -> tuple[str, str] | Question | Misfit:
    """A column and why: the one that was asked for, the only possible one, or the only one with a usual name."""
    if asked is not None:
        if asked not in sample.schema.names:
            return Question(flag, f"found no column {asked!r}; the columns are {sample.listed}")
        if asked not in possible:
            return Misfit(f"column {asked!r} is {sample.schema.field(asked).type}, which is no {what}")
        return asked, "as asked"
    if not possible:
        return Misfit(f"no column can be {what}: {sample.listed}")
    if len(possible) == 1:
        return possible[0], f"the only column that can be {what}"
    named = [name for name in possible if name.lower() in usual]
    if len(named) == 1:
        return named[0], "by its name"
    which = f"{', '.join(named)} are all called like it" if named else "none is called like it"
    return Question(flag, f"which column is {what}: {which}; the columns are {sample.listed}")
