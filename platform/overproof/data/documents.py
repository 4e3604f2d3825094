"""Reading the documents of a source's files: names and bytes, one file at a time.

A file that is a document is never held whole. A line of JSON or a row of Parquet is, since its format asks for that.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from overproof.config import JsonlSource, ParquetSource
from overproof.data.json_lines import read_json_line
from overproof.data.parquet_reader import refuse_objects
from overproof.data.sources import Source, source_root
from overproof.errors import InputError

Document = tuple[str, Iterable[bytes]]  # the name, and the content in parts of any size

CHUNK_BYTES = 1 << 20  # of a file that is a document, read at once
UTF8_BYTES, FIRST_MULTIBYTE = 4, 0x80  # of one character, at most; the first byte of one that has several
PIECE_BYTES = 1 << 20  # a longer document is tokenised in pieces: part of what prepared data is, so of its format


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
            yield name, iter(lambda: stream.read(CHUNK_BYTES), b"")


def iter_pieces(content: Iterable[bytes]) -> Iterator[bytes]:
    """A document in pieces of at most ``PIECE_BYTES``, one at least; its bytes alone decide where it is cut.

    That is in front of a word, its space included, where byte-level tokenizers cut by themselves: a piece has the
    tokens it has in the whole. Text without spaces is cut between two characters.
    """
    rest = bytearray()
    for part in content:
        rest += part
        while len(rest) > PIECE_BYTES:
            end = _piece_end(rest)
            yield bytes(rest[:end])
            del rest[:end]
    yield bytes(rest)


def _piece_end(content: bytearray) -> int:
    space = PIECE_BYTES
    while (space := content.rfind(b" ", PIECE_BYTES // 2, space)) > 0:
        before, after = content[space - 1], content[space + 1]
        if before > ord(" ") and (after >= FIRST_MULTIBYTE or chr(after).isalpha()):
            return space
    end = PIECE_BYTES
    while end > PIECE_BYTES - UTF8_BYTES and content[end] & 0xC0 == 0x80:  # inside a character
        end -= 1
    return end


def _lines(lines: Iterable[bytes], path: str, name: str, field: str) -> Iterator[Document]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = read_json_line(line, where)
        except UnicodeDecodeError:
            yield f"{name}:{number}", [line]  # not UTF-8: dropped and counted like any other document
            continue
        if not isinstance(record, dict) or field not in record:
            found = f"keys {', '.join(sorted(record)) or 'none'}" if isinstance(record, dict) else f"{record!r:.40}"
            raise InputError(f"{where}: found {found}; expected an object with the key {field!r} (data.source.field)")
        text = record[field]
        if text is not None and not isinstance(text, str):
            raise InputError(f"{where}: {field!r} holds {type(text).__name__}; expected a string")
        yield f"{name}:{number}", [(text or "").encode("utf-8", "surrogatepass")]


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
    column_type = file.schema_arrow.field(field).type
    if not (pa.types.is_string(column_type) or pa.types.is_large_string(column_type)):
        raise InputError(f"{path}: column {field!r} is {column_type}; expected string")
    row = 0
    for batch in file.iter_batches(columns=[field]):
        for value in batch.column(0).cast(pa.large_binary()):
            yield f"{name}:{row}", [value.as_py() or b""]
            row += 1
