"""Documents from the files of a source to parts: each holds those whose hashes lie in a range, in their order.

What one task does with its share, from and to files: no Ray here. Equal documents have equal hashes, so that duplicates
meet in one part, and the parts one after the other are all documents in the order of their hashes: the rank of a
document is its place in that order. N documents, K parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from overproof.config import NearDuplicates, ParquetSource
from overproof.data.cleaning import DUPLICATE, EMPTY, NUL_LINES, Borders, DocumentCheck, LeftOut, shares
from overproof.data.documents import FileSpan, NulLines, can_be_split, iter_documents, iter_pieces
from overproof.data.manifest import CLUSTER, DOCUMENTS
from overproof.data.minhash import MinHash, sketch
from overproof.data.near_duplicates import Resolved
from overproof.data.parquet_writer import open_writer
from overproof.data.part_files import BATCH_BYTES, RunWriter, iter_table, read_part, write_table
from overproof.data.source_files import SourceFile, compression_of, reason_of
from overproof.data.sources import Source, source_root
from overproof.errors import InputError
from overproof.files import FileEntry, filesystem, hashed_file, join_uri

HELD_BYTES = 16 << 20  # of a file that is a document: a longer one is read again whenever it is needed
LEAST_PART_BYTES, MOST_PART_BYTES, PARTS = 8 << 20, 256 << 20, 256  # of text; parts between these sizes
EXPANDED = 4  # bytes of text from one of a compressed file
DOCUMENTS_PER_GROUP = 1 << 16
HASH_BITS = 32  # of a hash, which decide on its part

DOCUMENT_SCHEMA = pa.schema(
    [
        ("sha256", pa.binary(32)),
        ("name", pa.string()),
        ("file", pa.string()),
        ("size_bytes", pa.int64()),
        ("content", pa.large_binary()),  # null of a file that is a document and long
        ("bands", pa.binary()),  # of its MinHash; null where near-copies are not looked for
    ]
)
BAND_SCHEMA = pa.schema(
    [
        ("number", pa.uint8()),
        ("band", pa.uint64()),
        ("second", pa.uint64()),  # the next band of the document
        ("part", pa.int32()),
        ("place", pa.int32()),  # in the part
        ("size_bytes", pa.int64()),
    ]
)


# --- reading --------------------------------------------------------------------------------------


def count_parts(files: Sequence[SourceFile], source: Source) -> int:
    """How many parts the documents of these files are put into: as many spans are read. Rows do not depend on it."""
    packed = isinstance(source, ParquetSource)
    total = sum(each.size_bytes * (EXPANDED if packed or compression_of(each.name) else 1) for each in files)
    part_bytes = min(max(total // PARTS, LEAST_PART_BYTES), MOST_PART_BYTES)
    return -(-total // part_bytes) or 1


def plan_spans(files: Sequence[SourceFile], source: Source, parts: int) -> list[list[FileSpan]]:
    """What each task reads: several files, one, or a part of one."""
    span_bytes = max(1, sum(file.size_bytes for file in files) // parts)
    planned, held, held_bytes = list[list[FileSpan]](), list[FileSpan](), 0
    for file in files:
        of = -(-file.size_bytes // span_bytes)
        if of > 1 and can_be_split(source, file.name):
            planned += [[FileSpan(file.name, number, of)] for number in range(of)]
            continue
        held.append(FileSpan(file.name))
        held_bytes += file.size_bytes
        if held_bytes >= span_bytes:
            planned.append(held)
            held, held_bytes = [], 0
    return [*planned, held] if held else planned


@dataclass
class Reading:
    """What a task found."""

    runs: list[str]
    left_out: dict[str, LeftOut] = field(default_factory=dict)  # by file; of whole ones together, under ""
    failed: dict[str, tuple[str, str]] = field(default_factory=dict)  # files: why, and the reason it is counted under


@dataclass(frozen=True)
class Reader:
    """Reads documents and checks each by itself."""

    uri: str
    source: Source
    near_duplicates: NearDuplicates | None
    parts: int

    def read(self, number: int, spans: Sequence[FileSpan]) -> Reading:
        """The documents of some spans as runs. A file that is not what the recipe says is told of, not raised: of what
        it gave before, nothing is used.
        """
        with RunWriter(self.uri, f"read-{number}", self.parts) as writer:
            reading = Reading(writer.runs)
            for table in self.tables(spans, reading):
                writer.add(table, _part_of(_first_words(table["sha256"]), self.parts))
        return reading

    def tables(self, spans: Sequence[FileSpan], reading: Reading) -> Iterator[pa.Table]:
        """The usable documents of spans, and in ``reading`` what is said of the others."""
        rows, held_bytes = list[dict[str, Any]](), 0
        for span in spans:
            left_out = LeftOut()
            try:
                for name, content in iter_documents(self.source, span):
                    row, fault, nul_lines = self._check(content)
                    left_out.check(name, fault, nul_lines)
                    if not fault:
                        rows.append({**row, "name": name, "file": span.file})
                        held_bytes += len(row["content"] or b"")
                    if held_bytes >= BATCH_BYTES:
                        yield self._table(rows)
                        rows, held_bytes = [], 0
            except InputError as error:
                reading.failed.setdefault(span.file, (str(error), reason_of(error)))
            else:
                reading.left_out.setdefault(span.file if span.of > 1 else "", LeftOut()).merge(left_out)
        yield self._table(rows)

    def _table(self, rows: list[dict[str, Any]]) -> pa.Table:
        if self.near_duplicates:
            short = [row for row in rows if row["bands"] is None]
            bands_NB = sketch([row["content"].decode() for row in short], self.near_duplicates)
            for row, bands in zip(short, bands_NB, strict=True):
                row["bands"] = bands.tobytes()
        return pa.Table.from_pylist(rows, DOCUMENT_SCHEMA)

    def _check(self, content: Iterable[bytes]) -> tuple[dict[str, Any], str, int]:
        check, lines, signature = DocumentCheck(), NulLines(), None
        pieces, is_held = list[bytes](), True
        for number, piece in enumerate(iter_pieces(lines.dropped_from(content))):
            check.update(piece)
            if self.near_duplicates and number == 1:
                signature = MinHash(self.near_duplicates)
                signature.update(pieces[0].decode(errors="ignore"))
            if signature:
                signature.update(piece.decode(errors="ignore"))
            is_held = is_held and (check.size_bytes <= HELD_BYTES or not is_whole_file(self.source))
            if not is_held:
                pieces = []
            else:
                pieces.append(piece)
        fault = check.finish()
        if fault == EMPTY and lines.count:
            fault = NUL_LINES
        row = {
            "sha256": bytes.fromhex(check.sha256),
            "size_bytes": check.size_bytes,
            "content": b"".join(pieces) if is_held else None,
            "bands": signature.bands().tobytes() if signature else None,  # of one piece: see ``_table``
        }
        return row, fault, lines.count


def is_whole_file(source: Source) -> bool:
    """Whether a document is a file, which can be read again without reading others."""
    return source.kind in ("folder", "stdlib")


def _part_of(words: NDArray[np.uint64], parts: int) -> NDArray[np.int64]:
    """The part that each hash falls into, by its first 8 bytes."""
    return (words >> np.uint64(64 - HASH_BITS)).astype(np.int64) * parts >> HASH_BITS


def _first_words(hashes: pa.ChunkedArray) -> NDArray[np.uint64]:
    """The first 8 bytes of each hash."""
    found = hashes.combine_chunks() if isinstance(hashes, pa.ChunkedArray) else hashes
    whole = np.frombuffer(found.buffers()[1] or b"", ">u8").reshape(-1, 4)
    return whole[found.offset : found.offset + len(found), 0].astype(np.uint64)


# --- parts ----------------------------------------------------------------------------------------


def part_name(number: int) -> str:
    """The table of a part."""
    return f"documents-{number}"


@dataclass(frozen=True)
class PartCounts:
    """What a part holds."""

    documents: int
    below_test: int  # documents whose hashes are below the border that the fraction sets
    below_held_out: int
    duplicates: LeftOut
    runs: list[str]  # of its bands


@dataclass(frozen=True)
class Merger:
    """Makes parts of runs."""

    uri: str
    runs: Sequence[str]
    unreadable: Sequence[str]  # files that gave some documents before they failed
    test_fraction: float
    validation_fraction: float
    bands: int  # B, or 0

    def merge(self, number: int, parts: int) -> PartCounts:
        """Write a part: of documents with the same hash, the one with the first name."""
        table = read_part(self.uri, self.runs, number, DOCUMENT_SCHEMA)
        if self.unreadable:
            table = table.filter(pc.invert(pc.is_in(table["file"], value_set=pa.array(self.unreadable))))
        table = table.sort_by([("sha256", "ascending"), ("name", "ascending")])
        hashes = table["sha256"]
        is_first = np.append(True, pc.not_equal(hashes[1:], hashes[:-1]).to_numpy())[: len(table)]
        duplicates = LeftOut()
        if not is_first.all():
            again = np.flatnonzero(~is_first)
            same = np.flatnonzero(is_first)[np.cumsum(is_first)[again] - 1]
            names, kept = (table["name"].take(rows).to_pylist() for rows in (again, same))
            duplicates.add(DUPLICATE, [f"{name} ({first})" for name, first in zip(names, kept, strict=True)])
            table = table.filter(pa.array(is_first))
        sizes = table["size_bytes"].to_numpy()
        held = np.where(table["content"].is_valid().to_numpy(), sizes, 0)
        write_table(self.uri, part_name(number), table.drop_columns("bands"), held)
        shares_N = shares(_first_words(table["sha256"]))
        held_out = self.test_fraction + self.validation_fraction
        return PartCounts(
            documents=len(table),
            below_test=int(np.sum(shares_N < self.test_fraction)),
            below_held_out=int(np.sum(shares_N < held_out)),
            duplicates=duplicates,
            runs=self._write_bands(number, parts, table) if self.bands else [],
        )

    def _write_bands(self, number: int, parts: int, table: pa.Table) -> list[str]:
        """Each band of each document, by the part that it falls into."""
        bands_NB = np.frombuffer(b"".join(table["bands"].to_pylist()), np.uint64).reshape(-1, self.bands)
        columns: dict[str, NDArray[Any]] = {
            "number": np.broadcast_to(np.arange(self.bands, dtype=np.uint8), bands_NB.shape),
            "band": bands_NB,
            "second": np.roll(bands_NB, -1, axis=1),
            "part": np.broadcast_to(np.int32(number), bands_NB.shape),
            "place": np.broadcast_to(np.arange(len(table), dtype=np.int32)[:, None], bands_NB.shape),
            "size_bytes": np.broadcast_to(table["size_bytes"].to_numpy()[:, None], bands_NB.shape),
        }
        found = pa.table([pa.array(columns[name].ravel()) for name in BAND_SCHEMA.names], BAND_SCHEMA)
        with RunWriter(self.uri, f"bands-{number}", parts) as writer:
            writer.add(found, _part_of(bands_NB.ravel(), parts))
        return writer.runs


@dataclass(frozen=True)
class Part:
    """One part, once all are known."""

    number: int
    first: int  # the rank of its first document
    count: int
    left_out: NDArray[np.int64]  # ranks in it, ascending, of near-copies that are not used
    kept_before: int  # used documents of the parts before it: a document's number is how many are used before it

    def kept(self, ranks_N: NDArray[np.int64]) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """Whether documents are used, and their numbers."""
        before = np.searchsorted(self.left_out, ranks_N)
        is_kept = np.searchsorted(self.left_out, ranks_N, side="right") == before
        return is_kept, self.kept_before + ranks_N - self.first - before


@dataclass(frozen=True)
class Parts:
    """All parts, in the order of their documents' hashes."""

    uri: str
    source: Source
    counts: NDArray[np.int64]  # (K,), of documents
    borders: Borders
    left_out: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))  # ranks, ascending

    @property
    def firsts(self) -> NDArray[np.int64]:
        """The rank of the first document of each part, (K,)."""
        found: NDArray[np.int64] = np.cumsum(self.counts) - self.counts
        return found

    def __iter__(self) -> Iterator[Part]:
        borders = np.searchsorted(self.left_out, np.append(self.firsts, self.counts.sum()))
        for number, (first, count) in enumerate(zip(self.firsts.tolist(), self.counts.tolist(), strict=True)):
            own = slice(borders[number], borders[number + 1])
            yield Part(number, first, count, self.left_out[own], first - int(own.start))

    def documents(self, split: str) -> int:
        """How many are used in a split: near-copies are left out of the train split alone."""
        test, held_out = self.borders.test, self.borders.held_out
        train = int(self.counts.sum()) - held_out - len(self.left_out)
        return {"test": test, "validation": held_out - test, "train": train}[split]


def iter_part(parts: Parts, part: Part, columns: Sequence[str]) -> Iterator[tuple[pa.RecordBatch, NDArray[np.int64]]]:
    """The documents of a part, a batch at a time, and their ranks."""
    rank = part.first
    for batch in iter_table(parts.uri, part_name(part.number), columns):
        yield batch, np.arange(rank, rank + len(batch))
        rank += len(batch)


TEXT_COLUMNS = ("name", "file", "sha256", "size_bytes", "content")  # that ``document_pieces`` needs


def document_pieces(source: Source, row: pa.RecordBatch, place: int) -> Iterator[bytes]:
    """A document in pieces; a long one is read again.

    Raises:
        InputError: its file was changed since it was read first.
    """
    content = row["content"][place]
    if content.is_valid:
        yield from iter_pieces([content.as_py()])
        return
    file, check = row["file"][place].as_py(), DocumentCheck()
    for _, content in iter_documents(source, FileSpan(file)):
        for piece in iter_pieces(NulLines().dropped_from(content)):
            check.update(piece)
            yield piece
    if check.sha256 != row["sha256"][place].as_py().hex():
        raise InputError(f"{source_root(source)[1]}/{file}: was changed while it was read; expected a file at rest")


def write_documents_file(parts: Parts, resolved: Resolved | None, uri: str) -> FileEntry:
    """The list of all documents that are used."""
    fields = [("document", pa.int64()), ("split", pa.string()), ("name", pa.string()), ("sha256", pa.string()),
              ("size_bytes", pa.int64()), *([(CLUSTER, pa.int64())] if resolved else [])]  # fmt: skip
    schema, held = pa.schema(fields), list[pa.Table]()
    files, path = filesystem(join_uri(uri, DOCUMENTS))
    with hashed_file(files, path) as stream, open_writer(stream, schema, DOCUMENTS_PER_GROUP) as writer:
        for part in parts:
            for batch, ranks_N in iter_part(parts, part, ("name", "sha256", "size_bytes")):
                is_kept, numbers_N = part.kept(ranks_N)
                columns = {
                    "document": numbers_N,
                    "split": parts.borders.splits(ranks_N).tolist(),
                    "name": batch["name"],
                    "sha256": [value.hex() for value in batch["sha256"].to_pylist()],
                    "size_bytes": batch["size_bytes"],
                    CLUSTER: _clusters(resolved, ranks_N, numbers_N, parts.borders.test),
                }
                found = pa.table([columns[name] for name in schema.names], schema)
                held.append(found.filter(pa.array(is_kept)))
            whole = pa.concat_tables([schema.empty_table(), *held])
            full = len(whole) // DOCUMENTS_PER_GROUP * DOCUMENTS_PER_GROUP
            if full:
                writer.write_table(whole.slice(0, full), row_group_size=DOCUMENTS_PER_GROUP)
            held = [whole.slice(full)]
        writer.write_table(held[0].combine_chunks(), row_group_size=DOCUMENTS_PER_GROUP)
    return stream.entry()


def _clusters(
    resolved: Resolved | None, ranks_N: NDArray[np.int64], numbers_N: NDArray[np.int64], test: int
) -> NDArray[np.int64]:
    """Of test documents, which are all used, ranks are numbers; others are by themselves."""
    if resolved is None:
        return numbers_N
    return np.where(ranks_N < test, resolved.clusters(ranks_N), numbers_N)
