"""Reading the documents of a source's files: names and bytes, one file at a time.

A file that is a document is never held whole. A line of JSON or a row of Parquet is, since its format asks for that.
"""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from overproof.config import JsonlSource, ParquetSource
from overproof.data.json_lines import BLANK, NUL, read_json_line
from overproof.data.parquet_columns import PARQUET, is_text, iter_columns, open_parquet
from overproof.data.source_files import compression_of, naming_faults, open_content
from overproof.data.sources import Source, source_root
from overproof.errors import InputError

Document = tuple[str, Iterable[bytes]]  # the name, and the content in parts of any size

CHUNK_BYTES = 1 << 20  # of a file that is a document, read at once
UTF8_BYTES, FIRST_MULTIBYTE = 4, 0x80  # of one character, at most; the first byte of one that has several
PIECE_BYTES = 1 << 20  # a longer document is tokenised in pieces: part of what prepared data is, so of its format


def beginning_of(text: str, characters: int) -> str:
    """At most so many characters, without a word that is cut: an example of what a model is asked."""
    text = text.lstrip()
    begun = re.match(rf"(?s).{{0,{characters}}}(?=\s|\Z)", text)
    return (begun[0] if begun and begun[0].strip() else text[:characters]).rstrip()


@dataclass(frozen=True)
class FileSpan:
    """A file, or one of several parts of it, each of as many bytes or row groups: the documents that begin there."""

    file: str
    number: int = 0
    of: int = 1
    lines_before: int = 0  # the part, where documents are lines

    def bounds(self, size: int) -> tuple[int, int]:
        """Where the part begins and ends in a file of this size, or of so many row groups."""
        return self.number * size // self.of, (self.number + 1) * size // self.of


def can_be_split(source: Source, name: str) -> bool:
    """Whether documents can be read from the middle of a file."""
    return isinstance(source, ParquetSource) or (isinstance(source, JsonlSource) and compression_of(name) is None)


def iter_documents(source: Source, span: FileSpan) -> Iterator[Document]:
    """The documents of one file or a part of it: the file itself, its lines, or its rows.

    Raises:
        InputError: naming the file and the line or column that is not what the recipe says.
    """
    files, folder = source_root(source)
    path = f"{folder}/{span.file}"
    if isinstance(source, ParquetSource):
        with naming_faults(path, PARQUET), files.open_input_file(path) as handle:
            yield from _rows(handle, path, span, source.field)
        return
    what = "JSON Lines" if isinstance(source, JsonlSource) else "text"
    with naming_faults(path, what), _open(files, path, span) as stream:
        if isinstance(source, JsonlSource):
            lines = io.BufferedReader(stream, CHUNK_BYTES)
            begun = lines if span.of == 1 else _begun_lines(lines, *span.bounds(stream.size()))
            yield from _lines(begun, path, span, source.field)
        else:
            yield span.file, without_mark(iter(lambda: stream.read(CHUNK_BYTES), b""))


def _open(files: fs.FileSystem, path: str, span: FileSpan) -> Any:
    return open_content(files, path) if span.of == 1 else files.open_input_file(path)


def _begun_lines(lines: io.BufferedReader, start: int, stop: int) -> Iterator[bytes]:
    """The lines that begin between two places: the last of them may end behind."""
    place = 0
    if start:
        place = lines.seek(start - 1) + len(lines.readline())
    while place < stop and (line := lines.readline()):
        yield line
        place += len(line)


def count_lines(source: Source, span: FileSpan) -> int:
    """How many lines begin in a part of a file that is not compressed.

    Raises:
        InputError: the file cannot be read.
    """
    files, folder = source_root(source)
    path = f"{folder}/{span.file}"
    with naming_faults(path, "JSON Lines"), files.open_input_file(path) as file:
        start, stop = span.bounds(file.size())
        found, place = int(start == 0), max(start - 1, 0)
        while place < stop - 1 and (content := file.read_at(min(CHUNK_BYTES, stop - 1 - place), place)):
            found += content.count(b"\n")
            place += len(content)
    return found


def without_mark(content: Iterable[bytes]) -> Iterator[bytes]:
    """A text's bytes without the byte order mark that some programs put before them."""
    start: bytes | None = b""
    for part in content:
        if start is None:
            yield part
            continue
        start += part
        if len(start) >= len(codecs.BOM_UTF8) or not codecs.BOM_UTF8.startswith(start):
            yield start.removeprefix(codecs.BOM_UTF8)
            start = None
    if start:
        yield start


class NulLines:
    """Drops the lines of a text that hold NULs alone, which a computer that lost power leaves in a log; counts them."""

    def __init__(self) -> None:
        self.count = 0

    def dropped_from(self, content: Iterable[bytes]) -> Iterator[bytes]:
        """The other lines."""
        at_start, held = True, 0  # of a line; NULs since its start, while it has held nothing else
        for part in content:
            if not held and NUL not in part:
                at_start = part.endswith(b"\n") if part else at_start
                yield part
                continue
            kept = bytearray()
            for line in io.BytesIO(part):
                text, ended = line.rstrip(b"\r\n"), line.endswith(b"\n")
                if at_start and not text.strip(NUL) and (held or text):
                    held += len(text)
                    at_start = not ended or at_start
                    if ended:
                        self.count, held = self.count + 1, 0
                    continue
                kept += NUL * held + line
                held, at_start = 0, ended
            yield bytes(kept)
        self.count += held > 0


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


def _lines(lines: Iterable[bytes], path: str, span: FileSpan, field: str) -> Iterator[Document]:
    name = span.file
    for number, line in enumerate(lines, start=span.lines_before + 1):
        if not line.strip(BLANK):
            if NUL in line:
                yield f"{name}:{number}", [line]  # dropped and counted like any other document
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


def _rows(handle: Any, path: str, span: FileSpan, field: str) -> Iterator[Document]:
    file = open_parquet(handle)
    schema = file.schema_arrow
    if field not in schema.names:
        raise InputError(
            f"{path}: columns are {', '.join(schema.names)}; expected a column {field!r} (data.source.field)"
        )
    groups, row = _groups_of(file.metadata, span)
    for batch in iter_columns(handle, path, [field], row_groups=groups):
        values = batch.column(0)
        if not (is_text(values.type) or pa.types.is_null(values.type)):
            raise InputError(f"{path}: column {field!r} is {values.type}; expected string")
        for value in values.cast(pa.large_string()).cast(pa.large_binary()):
            yield f"{span.file}:{row}", [value.as_py() or b""]
            row += 1


def _groups_of(metadata: pq.FileMetaData, span: FileSpan) -> tuple[list[int], int]:
    """The row groups of a span, and the rows before them."""
    start, stop = span.bounds(metadata.num_row_groups)
    return list(range(start, stop)), sum(metadata.row_group(number).num_rows for number in range(start))
