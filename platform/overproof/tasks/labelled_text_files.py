"""Texts with their classes, out of JSON Lines, CSV, Parquet or a folder for each class."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa
from pyarrow import csv, fs
from pyarrow import parquet as pq

from overproof.data.parquet_reader import refuse_objects
from overproof.data.sources import files_below
from overproof.errors import InputError, suggest_name
from overproof.files import filesystem

Labelled = tuple[str, str, tuple[str, ...]]  # where it is from, the text, its classes
ReadClasses = Callable[[str, Any], tuple[str, ...]]  # from where a text is, and the value of its column or folder

SUFFIXES = {"jsonl": ".jsonl", "csv": ".csv", "parquet": ".parquet", "folder": ".txt"}


def text_files(source: Any) -> list[fs.FileInfo]:
    """The files of a source.

    Raises:
        InputError: there are none.
    """
    suffix = SUFFIXES[source.kind]
    found = files_below(source.path, (suffix,))
    if not found:
        raise InputError(f"data.source.path: {source.path}: no {suffix} file; expected one at least")
    return found


def labelled_texts(source: Any, read_classes: ReadClasses) -> Iterator[Labelled]:
    """Every text of a source with its classes, in the order of files and rows.

    Raises:
        InputError: a file cannot be read, or a text or its class is missing.
    """
    files, root = filesystem(source.path)
    for info in text_files(source):
        if source.kind == "folder":
            yield _one_file(files, info.path, root, source, read_classes)
        elif source.kind == "jsonl":
            with files.open_input_stream(info.path) as stream:
                yield from _lines(io.BufferedReader(stream), info.path, source, read_classes)
        else:
            yield from _rows(files, info.path, source, read_classes)


def _one_file(files: fs.FileSystem, path: str, root: str, source: Any, read_classes: ReadClasses) -> Labelled:
    name = path.removeprefix(root).strip("/").split("/")
    if len(name) < 2:
        raise InputError(f"{path}: lies beside the classes' folders; expected {source.path}/CLASS/{name[-1] or 'FILE'}")
    with files.open_input_stream(path) as stream:
        content: bytes = stream.read()
    try:
        return path, _as_text(path, content.decode()), read_classes(path, name[0])
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8: {error}; expected text in UTF-8") from None


def _lines(lines: Iterable[bytes], path: str, source: Any, read_classes: ReadClasses) -> Iterator[Labelled]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record: Any = json.loads(line)
        except UnicodeDecodeError as error:
            raise InputError(f"{where}: not UTF-8: {error}; expected text in UTF-8") from None
        except ValueError as error:
            raise InputError(f"{where}: not JSON: {error}; expected one JSON object on each line") from None
        if not isinstance(record, dict):
            raise InputError(f"{where}: found {record!r:.40}; expected an object with a text and its class")
        _require_columns(where, list(record), source)
        yield where, _as_text(where, record[source.text]), read_classes(where, record[source.label])


def _rows(files: fs.FileSystem, path: str, source: Any, read_classes: ReadClasses) -> Iterator[Labelled]:
    row = 0
    try:
        for batch in (_csv_batches if source.kind == "csv" else _parquet_batches)(files, path, source):
            texts, labels = (batch.column(name).to_pylist() for name in (source.text, source.label))
            for text, label in zip(texts, labels, strict=True):
                row += 1
                where = f"{path}, row {row}"
                yield where, _as_text(where, text), read_classes(where, label)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8: {error}; expected text in UTF-8") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path}: not {source.kind}: {error}; expected a table with a header") from None


def _csv_batches(files: fs.FileSystem, path: str, source: Any) -> Iterator[pa.RecordBatch]:
    """The two columns alone: what the others hold makes no difference."""
    both = [source.text, source.label]
    quoted = csv.ParseOptions(newlines_in_values=True)
    with files.open_input_stream(path) as stream, csv.open_csv(stream, parse_options=quoted) as head:
        _require_columns(path, head.schema.names, source)
    chosen = csv.ConvertOptions(include_columns=both, column_types=dict.fromkeys(both, pa.string()))
    with files.open_input_stream(path) as stream:
        yield from csv.open_csv(stream, parse_options=quoted, convert_options=chosen)


def _parquet_batches(files: fs.FileSystem, path: str, source: Any) -> Iterator[pa.RecordBatch]:
    with files.open_input_file(path) as handle:
        file = pq.ParquetFile(handle)
        refuse_objects(file.schema_arrow, path)
        _require_columns(path, file.schema_arrow.names, source)
        yield from file.iter_batches(columns=[source.text, source.label])


def _require_columns(where: str, found: Sequence[str], source: Any) -> None:
    for field, name in (("text", source.text), ("label", source.label)):
        if name not in found:
            near = suggest_name(name, found)
            raise InputError(f"{where}: found {', '.join(found)}; expected {name!r} (data.source.{field}){near}")
        if found.count(name) > 1:
            raise InputError(f"{where}: several columns are named {name!r} (data.source.{field}); expected one")


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
