"""Folders as people have them: which files are read, what is left out and why, and what damaged ones come to."""

from __future__ import annotations

import bz2
import gzip
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from overproof.config import FolderSource, JsonlSource, ParquetSource
from overproof.data.document_parts import Reader, Reading
from overproof.data.documents import FileSpan, iter_documents
from overproof.data.source_files import (
    BAD_NAME,
    LINK_INSIDE,
    LINK_OUT,
    LINK_TO_NOTHING,
    LITTER,
    NO_FILE,
    OTHER_COMPRESSION,
    PACKED_PARQUET,
    FileListing,
    SourceReading,
    UnreadableFile,
)
from overproof.data.sources import Source, list_files
from overproof.errors import InputError
from overproof.tasks.conversations import read_conversations
from overproof.tasks.image_classification import ImageClassificationData
from overproof.tasks.images import describe_images
from overproof.tasks.labelled_text_files import labelled_texts, text_files
from overproof.tasks.recognition import look_at
from overproof.tasks.tables import describe_table
from overproof.tasks.tabular import TabularClassificationData
from overproof.tasks.text_classification import TextClassificationData


def zstd(content: bytes) -> bytes:
    return bytes(pa.Codec("zstd").compress(content, asbytes=True))


def texts(source: Source) -> list[str]:
    listing = list_files(source)
    found = (b"".join(content) for file in listing.files for _, content in iter_documents(source, FileSpan(file.name)))
    return [content.decode() for content in found]


def line(text: str) -> bytes:
    return b'{"text": "%s"}\n' % text.encode()


def test_json_lines_are_read_however_they_are_called_and_compressed(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    files = {
        "a.jsonl": line("a"), "b.jsonl.gz": gzip.compress(line("b1")) + gzip.compress(line("b2")),
        "c.ndjson": b"\xef\xbb\xbf" + line("c"), "d.JSONL": line("d"), "e.jsonl.bz2": bz2.compress(line("e")),
        "f.NDJSON.ZST": zstd(line("f1")) + zstd(line("f2")), "sub/g.jsonl": line("g"),
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "h.jsonl.xz").write_bytes(b"")
    (tmp_path / "README.md").write_text("about these")
    assert texts(JsonlSource(path=str(tmp_path))) == ["a", "b1", "b2", "c", "d", "e", "f1", "f2", "g"]
    assert texts(JsonlSource(path=str(tmp_path / "b.jsonl.gz"))) == ["b1", "b2"]
    skipped = list_files(JsonlSource(path=str(tmp_path))).skipped
    assert skipped == {OTHER_COMPRESSION: ("h.jsonl.xz",), "not .jsonl or .ndjson": ("README.md",)}
    look = look_at(str(tmp_path))
    assert look.files == {".jsonl": 7, ".xz": 1, ".md": 1}
    assert look.tables[".jsonl"].schema.names == ["text"]


def test_text_files_match_in_any_case_and_compressed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "B.TXT").write_text("b")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"c"))
    (tmp_path / "d.md").write_text("d")
    source = FolderSource(path=str(tmp_path))
    assert texts(source) == ["b", "a", "c"]
    assert list_files(source).skipped == {"not *.txt": ("d.md",)}
    assert texts(FolderSource(path=str(tmp_path), pattern="[c-d]*")) == ["c", "d"]


def test_litter_is_counted_and_never_read(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "x.parquet")
    (tmp_path / "x.parquet.gz").write_bytes(b"")
    litter = ["._x.parquet", ".hidden/y.parquet", "__MACOSX/x.parquet", "Thumbs.db", "x.parquet~", "_metadata"]
    for name in litter:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"\0\5\x16\7")
    listing = list_files(ParquetSource(path=str(tmp_path)))
    assert [file.name for file in listing.files] == ["x.parquet"]
    folders = {name.partition("/")[0] for name in litter}
    assert {reason: set(names) for reason, names in listing.skipped.items()} == {
        LITTER: folders,
        PACKED_PARQUET: {"x.parquet.gz"},
    }
    assert look_at(str(tmp_path)).tables[".parquet"].total_rows == 1


def test_links_out_of_the_folder_and_loops_are_not_followed(tmp_path: Path) -> None:
    corpus, outside = tmp_path / "corpus", tmp_path / "outside"
    (corpus / "sub").mkdir(parents=True)
    outside.mkdir()
    (outside / "secret.txt").write_text("secret")
    (corpus / "a.txt").write_text("a")
    (corpus / "stored").write_text("stored")
    (corpus / "loop").symlink_to(corpus)
    (corpus / "sub/up").symlink_to("..")
    (corpus / "self.txt").symlink_to("self.txt")
    (corpus / "away").symlink_to(outside)
    (corpus / "away.txt").symlink_to(outside / "secret.txt")
    (corpus / "again.txt").symlink_to("a.txt")
    (corpus / "named.txt").symlink_to("stored")
    os.mkfifo(corpus / "pipe.txt")
    listing = list_files(FolderSource(path=str(corpus)))
    assert [file.name for file in listing.files] == ["a.txt", "named.txt"]
    assert listing.skipped == {
        LINK_OUT: ("away", "away.txt"),
        LINK_INSIDE: ("again.txt", "loop", "sub/up"),
        LINK_TO_NOTHING: ("self.txt",),
        NO_FILE: ("pipe.txt",),
        "not *.txt": ("stored",),
    }
    (tmp_path / "link").symlink_to(corpus)  # the folder that is named may be a link
    assert list_files(FolderSource(path=str(tmp_path / "link"))).files == listing.files
    with pytest.raises(InputError, match="is a pipe, socket or device; expected a file or a folder"):
        list_files(JsonlSource(path=str(corpus / "pipe.txt")))


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")).write_text("b")
    source = FolderSource(path=str(tmp_path))
    with pytest.raises(InputError, match=r"caf\\xe9\.txt: its name is not UTF-8; expected one that is: rename it"):
        list_files(source)
    listing = list_files(source, "skip")
    assert [file.name for file in listing.files] == ["a.txt"]
    assert listing.skipped == {BAD_NAME: (r"caf\xe9.txt",)}


def overwritten(content: bytes) -> bytes:
    """Parquet with random bytes in its first page."""
    noise = np.random.default_rng(0).integers(0, 256, 400, np.uint8).tobytes()
    return content[:40] + noise + content[440:]


def parquet(table: pa.Table, **settings: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **settings)
    return bytes(sink.getvalue().to_pybytes())


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


RECORDS = b"".join(line(f"record {number} of some") for number in range(500))
ROWS = pa.table({"text": [f"row {number} of some" for number in range(500)]})
TWICE = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
DAMAGED: list[tuple[str, bytes, str]] = [
    ("x.jsonl.gz", half(gzip.compress(RECORDS)), "not gzip, cut short or damaged: Truncated compressed stream"),
    ("x.jsonl.zst", half(zstd(RECORDS)), "not zstd, cut short or damaged: "),
    ("x.jsonl.bz2", RECORDS, "not bz2, cut short or damaged: "),
    ("x.jsonl.gz", RECORDS, "not gzip, cut short or damaged: "),
    ("x.jsonl.gz", b"", "not gzip, cut short or damaged: it is empty"),
    ("x.jsonl", b'{"text": ' + b"[" * 100_000, "line 1: nested too deeply"),
    ("x.jsonl", b'{"text": "a", "b": ' + b"[" * 300 + b"]" * 300 + b"}", "line 1: nested too deeply"),
    ("x.parquet", overwritten(parquet(ROWS)), "not Parquet: "),
    ("x.parquet", overwritten(parquet(ROWS, compression="none", write_page_checksum=True)), "not Parquet: "),
    ("x.parquet", parquet(ROWS)[:-20], "not Parquet: "),
    ("x.parquet", b"", "not Parquet: "),
    ("x.parquet", parquet(TWICE), "several columns are named 'text'"),
]


def read_documents(source: Source, *files: str) -> tuple[list[dict[str, Any]], Reading]:
    """As a worker of ``prepare`` reads them."""
    reading = Reading([])
    tables = list(Reader("", source, None, 1).tables([FileSpan(file) for file in files], reading))
    return pa.concat_tables(tables).to_pylist(), reading


@pytest.mark.parametrize(("name", "content", "words"), DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_file_is_one_line(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    source: Source = ParquetSource(path=str(tmp_path)) if "parquet" in name else JsonlSource(path=str(tmp_path))
    with pytest.raises(UnreadableFile) as refused:
        texts(source)
    assert str(refused.value).startswith(f"{tmp_path}/{name}")
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
    _, reading = read_documents(source, name)  # what a worker hands on
    assert reading.failed == {name: (str(refused.value), refused.value.reason)}
    assert not reading.left_out


CSV = b"text,label\n" + b"".join(b"text %d,%d\n" % (i, i % 2) for i in range(200))
TABLE = pa.table({"text": [f"text {i}" for i in range(200)], "label": [i % 2 for i in range(200)]})


def of_texts(folder: Path, on_error: str) -> None:
    kind = "csv" if list(folder.glob("*.csv*")) else "parquet"
    source = {"kind": kind, "path": str(folder), "text": "text", "label": "label"}
    data = TextClassificationData.parse({"kind": "text_classification", "source": source, "on_error": on_error})
    reading = SourceReading(text_files(data), data.on_error)
    assert len(list(labelled_texts(data.source, reading, lambda _, value: (str(value),)))) == 200
    assert sum(reading.counts.values()) == 1


def of_tables(folder: Path, on_error: str) -> None:
    kind = "csv" if list(folder.glob("*.csv*")) else "parquet"
    section = {"source": {"kind": kind, "path": str(folder)}, "target": "label", "on_error": on_error}
    data = TabularClassificationData.parse({"kind": "tabular_classification", "categorical": ["text"], **section})
    assert len(describe_table(data)["columns"][0]["categories"]) == 200


@pytest.mark.parametrize("read", [of_texts, of_tables])
@pytest.mark.parametrize(
    ("whole", "good", "name", "content"),
    [
        ("a.csv", CSV, "b.csv.gz", gzip.compress(CSV)[:300]),
        ("a.csv.zst", zstd(CSV), "b.csv", b"\xff\xfe\0t"),
        ("a.csv.gz", gzip.compress(CSV), "b.csv", b""),
        ("a.parquet", parquet(TABLE), "b.parquet", overwritten(parquet(TABLE))),
    ],
    ids=("cut short", "no text", "empty", "overwritten"),
)
def test_tables_are_read_and_damaged_ones_left_out_if_asked(
    whole: str, good: bytes, name: str, content: bytes, read: Callable[[Path, str], None], tmp_path: Path
) -> None:
    (tmp_path / whole).write_bytes(good)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=name):
        read(tmp_path, "fail")
    read(tmp_path, "skip")
    (tmp_path / whole).unlink()
    with pytest.raises(InputError, match=name):  # none is left
        read(tmp_path, "skip")


def test_images_that_are_none_are_left_out_if_asked(tmp_path: Path) -> None:
    from PIL import Image

    for label in ("red", "blue"):
        (tmp_path / label).mkdir()
        Image.new("RGB", (8, 8), label).save(tmp_path / label / "b.png")
    (tmp_path / "blue/a.png").write_bytes((tmp_path / "blue/b.png").read_bytes()[:50])
    source = {"kind": "folder", "path": str(tmp_path)}
    with pytest.raises(InputError, match=r"blue/a\.png: not an image"):
        describe_images(ImageClassificationData.parse({"source": source}))
    found = describe_images(ImageClassificationData.parse({"source": source, "on_error": "skip"}))
    assert (found["height"], found["classes"]) == (8, ["blue", "red"])


def test_a_file_is_left_out_whole(tmp_path: Path) -> None:
    chat = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    (tmp_path / "a.jsonl").write_bytes(chat + b"\0\0\0\n" + chat + b"\0\n{")
    (tmp_path / "b.jsonl").write_bytes(b"\0\0\0\0\n" + chat)
    source = JsonlSource(path=str(tmp_path))
    reading = SourceReading(list_files(source), "skip")
    assert [each.where for each in read_conversations(source, reading)] == [f"{tmp_path}/b.jsonl, line 2"]
    assert (reading.counts, reading.nul_lines) == ({"not JSON Lines": 1}, 1)


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [("b.jsonl.gz", gzip.compress(RECORDS), half(gzip.compress(RECORDS))), ("b.parquet", parquet(ROWS), b"PAR1")],
    ids=("gzip", "parquet"),
)
def test_shrink_looks_at_the_tables_that_can_be_read_if_asked(
    name: str, good: bytes, bad: bytes, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(good)
    (tmp_path / f"a{name[1:]}").write_bytes(bad)
    suffix = f".{name.split('.')[1]}"
    assert f"a{name[1:]}" in look_at(str(tmp_path)).unreadable[suffix]
    assert look_at(str(tmp_path), "skip").tables[suffix].rows.num_rows == 500
    (tmp_path / name).unlink()
    assert f"a{name[1:]}" in look_at(str(tmp_path), "skip").unreadable[suffix]


# --- columns --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["a", "b", None], pa.string_view()),
        pa.array(["a", "b", None], pa.large_string()),
        pa.array(["a", "b", None]).dictionary_encode(),
        pa.ExtensionArray.from_storage(pa.json_(), pa.array(["a", "b", None])),
    ],
)
def test_text_of_any_arrow_type_is_read(column: pa.Array, tmp_path: Path) -> None:
    beside = pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"0123456789abcdef"] * 3, pa.binary(16)))
    pq.write_table(pa.table({"id": beside, "text": column, "label": [0, 1, 0]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": pa.nulls(2), "id": [1, 2]}), tmp_path / "b.parquet")
    assert texts(ParquetSource(path=str(tmp_path))) == ["a", "b", "", "", ""]
    look = look_at(str(tmp_path))
    sample = look.tables[".parquet"]
    assert sample.rows["text"].to_pylist() == ["a", "b", None]
    assert "id" not in sample.rows.column_names
    assert str(sample.schema.field("id").type) == "extension<arrow.uuid>"


def test_tables_with_columns_that_are_dropped_or_null(tmp_path: Path) -> None:
    ids = pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"0123456789abcdef"] * 4, pa.binary(16)))
    colours = pa.array(["red", "blue", "red", "blue"], pa.string_view())
    first = {"id": ids, "x": [1.0, 2.0, 3.0, 4.0], "colour": colours, "target": [0, 1, 0, 1]}
    pq.write_table(pa.table(first), tmp_path / "a.parquet")
    second = {"id": ids, "x": pa.nulls(4), "colour": colours.cast(pa.string()).dictionary_encode()}
    pq.write_table(pa.table({**second, "target": [0, 1, 0, 1]}), tmp_path / "b.parquet")
    section = {"source": {"kind": "parquet", "path": str(tmp_path)}, "target": "target"}
    with pytest.raises(InputError, match=r"column 'id': is extension<arrow\.uuid>; expected numbers: drop it"):
        describe_table(TabularClassificationData.parse(section))
    columns = describe_table(TabularClassificationData.parse({**section, "drop": ["id"]}))["columns"]
    assert [(column["name"], column["categories"]) for column in columns] == [("x", []), ("colour", ["blue", "red"])]


# --- bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_bytes", [1, 2, 3, 5, 1 << 20])
def test_marks_and_lines_of_nuls_are_no_text(chunk_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("overproof.data.documents.CHUNK_BYTES", chunk_bytes)
    plain = b"one\ntwo \0 of them\n\nthree\n\0x\n"
    with_nuls = b"one\n\0\0\0\ntwo \0 of them\n\n\0\0\r\nthree\n\0x\n\0\0"
    contents = {
        "a.txt": plain, "b.txt": b"\xef\xbb\xbf" + plain, "c.txt": with_nuls, "d.txt": b"\0" * 10, "e.txt": b"\xef\xbb",
        "f.txt": b"", "g.txt": b"\xef\xbb\xbf",
    }  # fmt: skip
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    source = FolderSource(path=str(tmp_path))
    rows, reading = read_documents(source, *sorted(contents))
    assert {row["name"]: row["content"] for row in rows} == dict.fromkeys(("a.txt", "b.txt", "c.txt"), plain)
    assert len({row["sha256"] for row in rows}) == 1
    left_out = reading.left_out[""]
    assert left_out.dropped == {"empty": 2, "undecodable": 1, "duplicate": 0, "lines of NULs": 3 + 1}
    assert left_out.names == {"undecodable": ["e.txt"], "empty": ["f.txt", "g.txt"]}


def test_lines_of_nuls_in_json_lines_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\0" * 20 + b"\n" + line("a") + b"\0\0\n\n" + line("b") + b"\0" * 7)
    source = JsonlSource(path=str(tmp_path))
    rows, reading = read_documents(source, "a.jsonl")
    assert [row["name"] for row in rows] == ["a.jsonl:2", "a.jsonl:5"]
    assert reading.left_out[""].counts == {"lines of NULs": 3}


def test_rows_of_nuls_in_csv_are_dropped(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(CSV + b"\0" * 30 + b"\n" + b"text 0,1\n")
    source = {"kind": "csv", "path": str(tmp_path), "text": "text", "label": "label"}
    data = TextClassificationData.parse({"kind": "text_classification", "source": source})
    reading = SourceReading(text_files(data))
    assert len(list(labelled_texts(data.source, reading, lambda _, value: (str(value),)))) == 201
    assert reading.nul_lines == 1


def test_a_listing_without_files_reads_nothing() -> None:
    assert list(SourceReading(FileListing("", ()), "skip").each_file(lambda file: [file])) == []
