"""Which files a source names, their digest, and the documents in them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from overproof.config import DataSection, FolderSource, JsonlSource, ParquetSource, StdlibSource, TokenizerFile
from overproof.data import documents, tokenization
from overproof.data.documents import FileSpan
from overproof.data.sources import list_files
from overproof.errors import InputError
from overproof.registry import TASKS
from overproof.tasks.image_classification import ImageClassificationData
from overproof.tasks.language_modeling import LanguageModelingData


def source_digest(data: DataSection) -> str:
    return TASKS[data.kind].source_digest(data)


def read(source: FolderSource | JsonlSource | ParquetSource, file: str) -> list[tuple[str, bytes]]:
    return [(name, b"".join(content)) for name, content in documents.iter_documents(source, FileSpan(file))]


def names(source: FolderSource | JsonlSource | ParquetSource | StdlibSource) -> list[str]:
    return [file.name for file in list_files(source).files]


def test_a_folder_is_listed_with_what_lies_below(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.txt", "sub/c.txt", "other.md"):
        (tmp_path / name).write_text(name)
    source = FolderSource(path=str(tmp_path))
    assert names(source) == ["a.txt", "b.txt", "sub/c.txt"]
    assert read(source, "sub/c.txt") == [("sub/c.txt", b"sub/c.txt")]


def test_the_standard_library_comes_without_tests() -> None:
    found = names(StdlibSource())
    assert {"os.py", "asyncio/base_events.py"} < set(found)
    parts = {part for name in found for part in Path(name).parts}
    assert not parts & {"site-packages", "__pycache__", "test", "tests", "idle_test"}


def test_the_digest_follows_names_sizes_and_times(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one")
    data = LanguageModelingData(source=FolderSource(path=str(tmp_path)))
    seen = [source_digest(data), source_digest(data)]
    assert seen[0] == seen[1]
    os.utime(file, ns=(1, 1))
    seen.append(source_digest(data))
    file.write_text("longer")
    seen.append(source_digest(data))
    file.rename(tmp_path / "b.txt")
    seen.append(source_digest(data))
    assert len(set(seen)) == 4


def test_the_digest_covers_a_tokenizer_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    tokenizer = tmp_path / "tokenizer.json"
    data = LanguageModelingData(source=FolderSource(path=str(tmp_path)), tokenizer=TokenizerFile(path=str(tokenizer)))
    with pytest.raises(InputError, match=r"data\.tokenizer\.path: .* no such file"):
        source_digest(data)
    tokenizer.write_text("{}")
    before = source_digest(data)
    tokenizer.write_text("{ }")
    assert source_digest(data) != before


def test_digits_and_the_standard_library_have_digests() -> None:
    assert len({source_digest(ImageClassificationData()), source_digest(LanguageModelingData())}) == 2


def test_listing_loads_neither_ray_nor_torch() -> None:
    code = "import sys, overproof.data.sources; print(sorted({'ray', 'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_source_that_names_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not found; expected a folder that holds"):
        list_files(FolderSource(path=str(tmp_path / "none")))
    with pytest.raises(InputError, match=r"none of its 0 entries matches \*\.txt"):
        list_files(FolderSource(path=str(tmp_path)))
    (tmp_path / "a.md").write_text("text")
    with pytest.raises(InputError, match=r"none of its 1 entries matches \*\.jsonl"):
        list_files(JsonlSource(path=str(tmp_path)))
    with pytest.raises(InputError, match="is a file; expected a folder"):
        list_files(FolderSource(path=str(tmp_path / "a.md")))
    with pytest.raises(InputError, match="expected a folder or a URI"):
        list_files(FolderSource(path="nowhere://bucket/folder"))


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'{"body": "one"}\n\n{"body": "\\u00e9\\n"}\r\n{"body": null}\n{"body": "\xff"}\n{"body": "\\ud800"}'
    )
    source = JsonlSource(path=str(path), field="body")
    assert names(source) == ["a.jsonl"]
    found = dict(read(source, "a.jsonl"))
    assert list(found) == [f"a.jsonl:{line}" for line in (1, 3, 4, 5, 6)]
    assert [found[f"a.jsonl:{line}"] for line in (1, 3, 4)] == [b"one", "\u00e9\n".encode(), b""]
    for line in (5, 6):
        with pytest.raises(UnicodeDecodeError):
            found[f"a.jsonl:{line}"].decode()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "a.jsonl, line 2: not JSON"),
        ('{"title": "x"}', "a.jsonl, line 2: found keys title; expected an object with the key 'text'"),
        ('["x"]', r"a.jsonl, line 2: found \['x'\]; expected an object"),
        ('{"text": 3}', "a.jsonl, line 2: 'text' holds int; expected a string"),
    ],
)
def test_bad_json_lines_are_refused(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(InputError, match=message):
        list(documents.iter_documents(JsonlSource(path=str(tmp_path)), FileSpan("a.jsonl")))


def test_parquet_rows(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["one", None, "\u00e9"], "other": [1, 2, 3]}), tmp_path / "a.parquet")
    found = read(ParquetSource(path=str(tmp_path)), "a.parquet")
    assert found == [("a.parquet:0", b"one"), ("a.parquet:1", b""), ("a.parquet:2", "\u00e9".encode())]


class Pickled(pa.ExtensionType):
    """What an object column looks like to a reader that does not know its type."""

    def __init__(self) -> None:
        super().__init__(pa.large_binary(), "somebody.objects")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""


def test_parquet_that_is_not_text_is_refused(tmp_path: Path) -> None:
    source, path = ParquetSource(path=str(tmp_path)), tmp_path / "a.parquet"

    def refused(table: pa.Table, message: str) -> None:
        pq.write_table(table, path)
        with pytest.raises(InputError, match=message):
            list(documents.iter_documents(source, FileSpan("a.parquet")))

    refused(pa.table({"body": ["x"]}), "columns are body; expected a column 'text'")
    refused(pa.table({"text": [1]}), "column 'text' is int64; expected string")
    objects = pa.ExtensionArray.from_storage(Pickled(), pa.array([b"\x80"], pa.large_binary()))
    refused(pa.table({"text": objects}), r"column 'text' holds objects \(somebody.objects\)")
    path.write_text("text")
    with pytest.raises(InputError, match="not Parquet"):
        list(documents.iter_documents(source, FileSpan("a.parquet")))


def test_rays_own_object_columns_are_never_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.data._internal.object_extensions.arrow import ArrowPythonObjectArray

    objects = ArrowPythonObjectArray.from_objects([{"a": object}])
    pq.write_table(pa.table({"text": ["x"], "extra": objects}), tmp_path / "a.parquet")

    def unpickled(content: object) -> object:
        raise AssertionError(f"unpickled {content!r}")

    monkeypatch.setattr("ray.cloudpickle.loads", unpickled)
    monkeypatch.setattr("pickle.loads", unpickled)
    assert read(ParquetSource(path=str(tmp_path)), "a.parquet") == [("a.parquet:0", b"x")]
    with pytest.raises(InputError, match="column 'extra' holds objects"):
        list(documents.iter_documents(ParquetSource(path=str(tmp_path), field="extra"), FileSpan("a.parquet")))


LINES = "".join(f"def f{i}(x):\n    return x + {i}\n\n" for i in range(90))


@pytest.mark.parametrize("chunk_bytes", [1, 7, 64, 5000])
@pytest.mark.parametrize(
    "text", [LINES, "", "short", "\u00e9\U0001f600\u20ac" * 400, "x" * 1000, "\n" * 1000, "a\r\n" * 300]
)
def test_a_long_document_is_cut_where_its_bytes_say(
    text: str, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "PIECE_BYTES", 100)
    content = text.encode()
    chunks = [content[start : start + chunk_bytes] for start in range(0, len(content), chunk_bytes)]
    pieces = list(documents.iter_pieces(chunks))
    assert b"".join(pieces) == content
    assert pieces == list(documents.iter_pieces([content]))
    assert all(len(piece) <= 100 for piece in pieces)
    assert all(len(piece) > 45 for piece in pieces[:-1])
    assert "".join(piece.decode() for piece in pieces) == text  # no character is cut
    if text == LINES:
        assert {piece.split(maxsplit=1)[0] for piece in pieces[1:]} <= {b"return", b"x"} | {
            b"f%d(x):" % i for i in range(90)
        }


def test_the_pieces_of_a_text_have_the_tokens_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "PIECE_BYTES", 100)
    tokenizer = tokenization.train_bpe([LINES], 512)
    (whole,) = tokenization.encode(tokenizer, [LINES])
    pieces = [piece.decode() for piece in documents.iter_pieces([LINES.encode()])]
    assert len(pieces) > 20
    assert np.array_equal(np.concatenate(tokenization.encode(tokenizer, pieces)), whole)


def test_bytes_that_are_no_text_are_cut_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "PIECE_BYTES", 100)
    content = b"\x80" * 1000
    assert b"".join(documents.iter_pieces([content])) == content
