"""The first rows of tables, for looking at data before their task is known: at most ``SAMPLE_BYTES`` of one file."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
from pyarrow import csv, fs

from overproof.data.json_lines import BLANK
from overproof.data.parquet_columns import as_plain_type, is_text, iter_columns, open_parquet
from overproof.data.row_files import holds_objects
from overproof.data.source_files import (
    FileListing,
    OnError,
    SourceFile,
    SourceReading,
    compression_of,
    naming_faults,
)
from overproof.errors import InputError

SAMPLE_ROWS = 10_000  # of a Parquet file
SAMPLE_BYTES = 4 << 20  # of a text file
TABLES = (".csv", ".jsonl", ".parquet")
LISTED = 12  # columns, in a message
LARGEST_INTEGER = 2**63
NAMES = "lists of names or whole numbers"
# What JSON has, by the kind of a column that holds nothing else. Other nested columns are in the schema alone.
JSON_KINDS: Mapping[str, pa.DataType] = {
    "texts": pa.string(),
    "whole numbers": pa.int64(),
    "numbers": pa.float64(),
    "true or false": pa.bool_(),
    "objects": pa.struct([]),
    NAMES: pa.list_(pa.string()),
    "lists": pa.list_(pa.null()),
}


@dataclass(frozen=True)
class TableSample:
    """The first rows of the tables of one kind. Columns of bytes and nested ones are in the schema alone, but
    for lists of texts or whole numbers.

    Categories are so in the schema; among the rows they are what they stand for.
    """

    schema: pa.Schema
    rows: pa.Table
    total_rows: int  # of all files: exact for Parquet, else by their sizes
    mixed: Mapping[str, str] = field(default_factory=dict)  # columns of several kinds, left out: what they hold

    def columns(self, *tests: Any) -> list[str]:
        """Names of the columns whose type passes one of the tests, such as ``pa.types.is_string``."""
        return [column.name for column in self.schema if any(test(column.type) for test in tests)]

    @property
    def listed(self) -> str:
        """The columns, for a message."""
        names = [f"{column.name} ({column.type})" for column in self.schema]
        names += [f"{name} ({what})" for name, what in self.mixed.items()]
        return ", ".join(names[:LISTED]) + (", ..." if len(names) > LISTED else "")

    @property
    def part(self) -> str:
        """Which rows were looked at, where they are not all; for a message."""
        looked = self.rows.num_rows
        return "" if looked >= self.total_rows else f"in the first {looked:,} of about {self.total_rows:,} rows"


class UnreadableTable(Exception):
    """Tables are not what their name says: which, what was found, and what was expected."""


def sample_tables(files: fs.FileSystem, listing: FileListing, suffix: str, on_error: OnError) -> TableSample:
    """Of tables of one kind, the first rows of the first one; of the first that can be read, where others are skipped.

    Raises:
        UnreadableTable: it cannot be read, or has no rows.
    """
    try:
        if suffix == ".parquet":
            return _parquet_sample(files, listing, on_error)
        filled = replace(listing, files=tuple(file for file in listing.files if file.size_bytes))
        samples = SourceReading(filled, on_error).each_file(lambda file: [_text_sample(files, listing, file, suffix)])
        found = next(samples, None)
    except InputError as error:
        raise UnreadableTable(str(error)) from None
    if found is None:
        raise UnreadableTable(f"{listing.path(listing.files[0])}: is empty; expected rows")
    return found


def _text_sample(files: fs.FileSystem, listing: FileListing, file: SourceFile, suffix: str) -> TableSample:
    path = listing.path(file)
    with naming_faults(path, suffix[1:]):
        with files.open_input_file(path) as stored:
            codec = compression_of(path)
            stream = pa.CompressedInputStream(stored, codec) if codec else stored
            content = stream.read(SAMPLE_BYTES)
            whole = len(content) < SAMPLE_BYTES or not stream.read(1)
            read_bytes = file.size_bytes if whole else stored.tell()
        sample = _csv_sample(content, whole) if suffix == ".csv" else _jsonl_sample(content, whole)
        _require_distinct(sample.schema.names)
    if not sample.rows.num_rows:
        raise UnreadableTable(f"{path}: has a header and no rows; expected some")
    total = round(sample.rows.num_rows * sum(each.size_bytes for each in listing.files) / max(read_bytes, 1))
    return TableSample(sample.schema, _plain(sample.rows), max(total, sample.rows.num_rows), sample.mixed)


def _csv_sample(content: bytes, whole: bool) -> TableSample:
    rows = csv.read_csv(
        io.BytesIO(content if whole else _whole_rows(content)),
        read_options=csv.ReadOptions(block_size=SAMPLE_BYTES),  # a row lies in one block
        parse_options=csv.ParseOptions(newlines_in_values=True),
    )
    for column in rows.schema:
        if is_bytes(column.type):  # what Arrow makes of text that is no UTF-8
            raise ValueError(f"column {column.name!r} is not UTF-8, expected that encoding")
    return TableSample(rows.schema, rows, rows.num_rows)


def _whole_rows(content: bytes) -> bytes:
    """Up to an end of a line that no quotes are open at."""
    end = content.rfind(b"\n") + 1
    while end and content.count(b'"', 0, end) % 2:
        end = content.rfind(b"\n", 0, end - 1) + 1
    if not end:
        raise ValueError(f"no row ends within its first {SAMPLE_BYTES >> 20} MiB")
    return content[:end]


def _jsonl_sample(content: bytes, whole: bool) -> TableSample:
    """Every column by the kinds of its values: what they spell, such as a date, makes no difference."""
    if not whole and b"\n" not in content:
        raise ValueError(f"no line ends within its first {SAMPLE_BYTES >> 20} MiB")
    lines = (content if whole else content[: content.rindex(b"\n")]).split(b"\n")
    records: list[dict[str, Any]] = []
    kinds: dict[str, dict[str, int]] = {}  # of each column: the line where each kind is first
    for number, line in enumerate(lines, start=1):
        if not line.strip(BLANK):
            continue
        try:
            record = json.loads(line)
        except RecursionError:
            raise ValueError(f"line {number} is nested too deeply") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number}: {error.msg}") from None
        if not isinstance(record, dict):
            raise ValueError(f"line {number} is no object")
        records.append(record)
        for name, value in record.items():
            found = kinds.setdefault(name, {})
            if value is not None:
                found.setdefault(_json_kind(value), number)
    types = {name: _column_type(found) for name, found in kinds.items()}
    mixed = {name: _described(kinds[name]) for name, kind in types.items() if kind is None}
    schema = pa.schema([(name, kind) for name, kind in types.items() if kind is not None])
    flat = [column for column in schema if _is_plain(column.type)]
    columns = [pa.array([_json_value_as(r.get(c.name), c.type) for r in records], c.type) for c in flat]
    rows = pa.table(columns, names=[c.name for c in flat]) if flat else pa.table({"": pa.nulls(len(records))})
    return TableSample(schema, rows, len(records), mixed)


def _json_kind(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int):
        return "whole numbers" if -LARGEST_INTEGER <= value < LARGEST_INTEGER else "numbers"
    if isinstance(value, list):
        return NAMES if all(isinstance(each, str | int) for each in value) else "lists"
    return {str: "texts", float: "numbers", dict: "objects"}[type(value)]


def _column_type(found: Mapping[str, int]) -> pa.DataType | None:
    """Of a column with these kinds; None where they do not go together."""
    if not found:
        return pa.null()
    if found.keys() == {"whole numbers", "numbers"}:
        return JSON_KINDS["numbers"]
    if found.keys() == {NAMES, "lists"}:
        return JSON_KINDS["lists"]
    return JSON_KINDS[next(iter(found))] if len(found) == 1 else None


def _json_value_as(value: Any, kind: pa.DataType) -> Any:
    if isinstance(value, list):
        return [str(each) for each in value]
    return float(value) if isinstance(value, int) and pa.types.is_floating(kind) else value


def _described(found: Mapping[str, int]) -> str:
    return " and ".join(f"{kind} (line {line})" for kind, line in found.items())


def _parquet_sample(files: fs.FileSystem, listing: FileListing, on_error: OnError) -> TableSample:
    """Of the first file with rows; or of one that has values in more columns, where others lack those of some."""
    total, best = 0, None

    def read(file: SourceFile) -> list[tuple[pa.Schema, int, str]]:
        path = listing.path(file)
        with naming_faults(path, "parquet"), files.open_input_file(path) as handle:
            opened = open_parquet(handle)
            _require_distinct(opened.schema_arrow.names)
            return [(opened.schema_arrow, opened.metadata.num_rows, path)]

    for schema, rows, path in SourceReading(listing, on_error).each_file(read):
        total += rows
        lacking = sum(pa.types.is_null(column.type) for column in schema)
        if rows and (best is None or lacking < best[0]):
            best = lacking, path, schema
    if best is None:
        raise UnreadableTable(f"{listing.path(listing.files[0])}: has no rows; expected some")
    _, path, schema = best
    told = pa.schema([_as_told(column) for column in schema])
    plain = [column.name for column in told if _is_plain(column.type)]
    with naming_faults(path, "parquet"), files.open_input_file(path) as handle:
        first = next(iter_columns(handle, path, plain, batch_size=SAMPLE_ROWS)) if plain else None
    return TableSample(told, pa.Table.from_batches([first]) if first else pa.table({"": pa.nulls(total)}), total)


def _as_told(column: pa.Field) -> pa.Field:
    """A column as the schema of a sample has it: one of an extension type stays that, unless it stores texts."""
    plain = as_plain_type(column.type)
    known = isinstance(column.type, pa.BaseExtensionType)
    if (known or holds_objects(column)) and not is_text(plain):
        return pa.field(column.name, column.type if known else pa.opaque(column.type, "unknown", "unknown"))
    return column if pa.types.is_dictionary(column.type) else pa.field(column.name, plain)


def _require_distinct(names: list[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"several columns are named {twice[0]!r}, expected a name of its own for each")


def _plain(rows: pa.Table) -> pa.Table:
    return rows.select([column.name for column in rows.schema if _is_plain(column.type)])


def _is_plain(kind: pa.DataType) -> bool:
    if isinstance(kind, pa.BaseExtensionType):
        return False
    return is_list_of_names(kind) or not (pa.types.is_nested(kind) or is_bytes(kind))


def is_list_of_names(kind: pa.DataType) -> bool:
    """Whether a column holds lists of texts or of whole numbers."""
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return False
    return is_text(kind.value_type) or bool(pa.types.is_integer(kind.value_type))


def is_bytes(kind: pa.DataType) -> bool:
    """Whether a column holds bytes that are no text."""
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))
