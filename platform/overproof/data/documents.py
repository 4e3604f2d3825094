"""Reading the documents of a source's files: names and bytes, one file at a time."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from overproof.config import JsonlSource, ParquetSource
from overproof.data.parquet_reader import refuse_objects
from overproof.data.sources import Source, source_root
from overproof.errors import InputError

Document = tuple[str, bytes]


def iter_documents(source: Source, name: str) -> Iterator[Document]:
    """The documents of one file: the file itself, its lines, or its rows.

    Raises:
        InputError: naming the file and the line or column that is not what the recipe says.
    """
    files, folder = source_root(source)
    path = f"{folder}/{name}"
    if isinstance(source, ParquetSource):
        with files.open_input_file(path) as handle:
            yield from _rows(handle, path, name, source.field)
        return
    with files.open_input_stream(path) as stream:
        if isinstance(source, JsonlSource):
            yield from _lines(io.BufferedReader(stream), path, name, source.field)
        else:
            yield name, stream.read()


def _lines(lines: Iterable[bytes], path: str, name: str, field: str) -> Iterator[Document]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record: Any = json.loads(line)
        except UnicodeDecodeError:
            yield f"{name}:{number}", line  # not UTF-8: dropped and counted like any other document
            continue
        except ValueError as error:
            raise InputError(f"{where}: not JSON: {error}; expected one JSON object on each line") from None
        if not isinstance(record, dict) or field not in record:
            found = f"keys {', '.join(sorted(record)) or 'none'}" if isinstance(record, dict) else f"{record!r:.40}"
            raise InputError(f"{where}: found {found}; expected an object with the key {field!r} (data.source.field)")
        text = record[field]
        if text is not None and not isinstance(text, str):
            raise InputError(f"{where}: {field!r} holds {type(text).__name__}; expected a string")
        yield f"{name}:{number}", (text or "").encode("utf-8", "surrogatepass")


def _rows(handle: Any, path: str, name: str, field: str) -> Iterator[Document]:
    try:
        file = pq.ParquetFile(handle)
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(f"{path}: not Parquet: {error}") from None
    refuse_objects(file.schema_arrow, path)
    if field not in file.schema_arrow.names:
        raise InputError(
            f"{path}: columns are {', '.join(file.schema_arrow.names)}; expected a column {field!r} (data.source.field)"
        )
    kind = file.schema_arrow.field(field).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise InputError(f"{path}: column {field!r} is {kind}; expected string")
    row = 0
    for batch in file.iter_batches(columns=[field]):
        for value in batch.column(0).cast(pa.large_binary()):
            yield f"{name}:{row}", value.as_py() or b""
            row += 1
