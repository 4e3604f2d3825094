"""Texts with their classes, out of JSON Lines, CSV, Parquet or a folder for each class."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa
from pyarrow import csv, fs

from overproof.data.csv_rows import csv_options
from overproof.data.json_lines import read_json_lines
from overproof.data.parquet_columns import iter_columns, open_parquet
from overproof.data.source_files import (
    FileListing,
    SourceFile,
    SourceReading,
    UnreadableFile,
    list_suffix,
    naming_faults,
    open_content,
)
from overproof.errors import InputError, suggest_name
from overproof.files import filesystem

Labelled = tuple[str, str, tuple[str, ...]]  # where it is from, the text, its classes
ReadClasses = Callable[[str, Any], tuple[str, ...]]  # from where a text is, and the value of its column or folder


def text_files(data: Any) -> FileListing:
    """The files of a recipe's section.

    Raises:
        InputError: there are none.
    """
    suffix = ".txt" if data.source.kind == "folder" else f".{data.source.kind}"
    return list_suffix(data.source.path, suffix, data.on_error)


def labelled_texts(source: Any, reading: SourceReading, read_classes: ReadClasses) -> Iterator[Labelled]:
    """Every text of a source with its classes, in the order of files and rows; ``reading`` has its files.

    Raises:
        InputError: a file cannot be read, or a text or its class is missing.
    """
    files, _ = filesystem(source.path)

    def read(file: SourceFile) -> Iterator[Labelled]:
        path = reading.listing.path(file)
        if source.kind == "folder":
            yield _one_file(files, path, file.name, source, read_classes)
        elif source.kind == "jsonl":
            with naming_faults(path, "JSON Lines"), open_content(files, path) as stream:
                yield from _lines(read_json_lines(io.BufferedReader(stream), path, reading), source, read_classes)
        else:
            yield from _rows(files, path, source, read_classes, reading)

    yield from reading.each_file(read)


def _one_file(files: fs.FileSystem, path: str, name: str, source: Any, read_classes: ReadClasses) -> Labelled:
    label, slash, rest = name.partition("/")
    if not slash:
        raise InputError(f"{path}: lies beside the classes' folders; expected {source.path}/CLASS/{rest or label}")
    with naming_faults(path, "text"):
        with open_content(files, path) as stream:
            content: bytes = stream.read()
        return path, _as_text(path, content.decode("utf-8-sig")), read_classes(path, label)


def _lines(records: Iterable[tuple[str, Any]], source: Any, read_classes: ReadClasses) -> Iterator[Labelled]:
    for where, record in records:
        if not isinstance(record, dict):
            raise InputError(f"{where}: found {record!r:.40}; expected an object with a text and its class")
        _require_columns(where, list(record), source)
        yield where, _as_text(where, record[source.text]), read_classes(where, record[source.label])


def _rows(
    files: fs.FileSystem, path: str, source: Any, read_classes: ReadClasses, reading: SourceReading
) -> Iterator[Labelled]:
    row = 0
    with naming_faults(path, source.kind):
        for batch in (_csv_batches if source.kind == "csv" else _parquet_batches)(files, path, source, reading):
            texts, labels = (batch.column(name).to_pylist() for name in (source.text, source.label))
            for text, label in zip(texts, labels, strict=True):
                row += 1
                where = f"{path}, row {row}"
                yield where, _as_text(where, text), read_classes(where, label)


def _csv_batches(files: fs.FileSystem, path: str, source: Any, reading: SourceReading) -> Iterator[pa.RecordBatch]:
    """The two columns alone: what the others hold makes no difference."""
    both = [source.text, source.label]
    heading = csv_options(SourceReading(reading.listing))
    with open_content(files, path) as stream, csv.open_csv(stream, parse_options=heading) as head:
        _require_columns(path, head.schema.names, source)
    chosen = csv.ConvertOptions(include_columns=both, column_types=dict.fromkeys(both, pa.string()))
    with open_content(files, path) as stream:
        yield from csv.open_csv(stream, parse_options=csv_options(reading), convert_options=chosen)


def _parquet_batches(files: fs.FileSystem, path: str, source: Any, reading: SourceReading) -> Iterator[pa.RecordBatch]:
    del reading
    with files.open_input_file(path) as handle:
        _require_columns(path, open_parquet(handle).schema_arrow.names, source)
        yield from iter_columns(handle, path, [source.text, source.label])


def _require_columns(where: str, found: Sequence[str], source: Any) -> None:
    for field, name in (("text", source.text), ("label", source.label)):
        if name not in found:
            near = suggest_name(name, found)
            raise InputError(f"{where}: found {', '.join(found)}; expected {name!r} (data.source.{field}){near}")
        if found.count(name) > 1:
            raise UnreadableFile(
                f"{where}: several columns are named {name!r} (data.source.{field}); expected one",
                "several columns of one name",
            )


def _as_text(where: str, value: Any) -> str:
    if value is not None and not isinstance(value, str):
        raise InputError(f"{where}: the text is {type(value).__name__}; expected a string")
    if value is None or not value.strip():
        raise InputError(f"{where}: the text is empty; expected one: leave it out")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise InputError(f"{where}: the text holds half of a character; expected valid Unicode")
    return value


def as_class(where: str, value: Any) -> str:
    """The name of a class.

    Raises:
        InputError: there is none, or the value is neither a name nor a number.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if value is not None and not isinstance(value, str | int):
        raise InputError(f"{where}: the class is {type(value).__name__}; expected its name or number")
    if value is None or not str(value).strip():
        raise InputError(f"{where}: there is no class; expected its name or number")
    return str(value)
