"""Text from files to shards, on a real cluster."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus import context, text_recipe, write_corpus
from tokenizers import Tokenizer

from faulty_bucket import faulty_bucket
from made_tokenizers import ODD_TEXTS, unigram
from overproof.artifacts import Artifact, Record
from overproof.config import FolderSource
from overproof.config.evaluation import Parity
from overproof.data import document_parts, heartbeat, shard_layout
from overproof.data.cleaning import split_of
from overproof.data.document_parts import Reader, Reading, document_pieces
from overproof.data.documents import PIECE_BYTES, FileSpan
from overproof.data.manifest import START, Manifest
from overproof.data.parquet_reader import Shards
from overproof.data.prepare import SCRATCH, prepare
from overproof.data.source_files import SourceFile
from overproof.data.tokenizer_json import BYTE_NAMES
from overproof.engines.llamacpp import LlamaCpp
from overproof.errors import InputError
from overproof.evaluate import gate
from overproof.evaluate.metrics import MeasuredFile
from overproof.export.gguf_file import export_gguf
from overproof.files import file_sha256, filesystem
from overproof.models.hf_directory import build_model, save_model
from overproof.stage_context import Notice, ProgressEvent, TaskProgress
from overproof.tasks.base import Metric
from overproof.tasks.text_evaluation import split_otherwise

pytestmark = pytest.mark.usefixtures("ray_cluster")


def folder(path: Path | str) -> str:
    return f"{{kind: folder, path: '{path}'}}"


def hashes(root: Path) -> dict[str, str]:
    found = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): file_sha256(path) for path in found}


@pytest.fixture(scope="module")
def prepared(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, object]]:
    """A corpus with one file of every kind that is dropped; the corpus, the result and its metrics."""
    del ray_cluster
    corpus = tmp_path_factory.mktemp("corpus")
    write_corpus(corpus)
    (corpus / "empty.txt").write_text(" \n")
    (corpus / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (corpus / "zz-copy.txt").write_bytes((corpus / "003.txt").read_bytes())
    told = list[ProgressEvent]()
    recipe = text_recipe(tmp_path_factory.mktemp("store"), folder(corpus))
    given = context(recipe, "whole", told.append)
    metrics = prepare(given)
    notices = [event.text for event in told if isinstance(event, Notice)]
    assert notices[0].startswith("left out, not UTF-8 (Latin-1 perhaps): latin.txt; ")
    assert notices[1] == "left out, the same as another: zz-copy.txt (003.txt)"
    assert notices[-1] == "kept 40 documents; left out: 1 empty, 1 undecodable, 1 duplicate"
    return corpus, Path(given.draft.uri), metrics


def test_counts(prepared: tuple[Path, Path, dict[str, object]]) -> None:
    _, root, metrics = prepared
    manifest = Manifest.read(root)
    assert metrics["documents"] == 40
    assert metrics["dropped"] == manifest.dropped == {"empty": 1, "undecodable": 1, "duplicate": 1}
    assert manifest.rows_per_group * manifest.groups == manifest.splits["train"].rows
    assert manifest.tokenizer_sha256 == file_sha256(root / "tokenizer.json")
    assert manifest.outputs == Tokenizer.from_file(str(root / "tokenizer.json")).get_vocab_size() <= 320
    files = [shard for split in manifest.splits.values() for shard in split.shards]
    assert metrics["size_bytes"] == sum(shard.size_bytes for shard in files)
    for shard in files:
        assert file_sha256(root / shard.path) == shard.sha256


def test_no_document_leaks_and_every_held_out_byte_is_scored(prepared: tuple[Path, Path, dict[str, object]]) -> None:
    corpus, root, _ = prepared
    manifest, tokenizer = Manifest.read(root), Tokenizer.from_file(str(root / "tokenizer.json"))
    listed = pq.read_table(root / "documents.parquet").to_pylist()
    assert [row["document"] for row in listed] == list(range(40))
    assert [row["sha256"] for row in listed] == sorted(file_sha256(corpus / row["name"]) for row in listed)
    assert "zz-copy.txt" not in {row["name"] for row in listed}
    for split in ("validation", "test"):
        shards = Shards(root, split, ("sample_id", "document", "tokens", "length"))
        rows = shards.take(np.arange(shards.rows))
        own = [row for row in listed if row["split"] == split]
        assert sorted(set(rows["document"].tolist())) == [row["document"] for row in own]
        assert manifest.splits[split].documents == len(own)
        for row in own:
            mine = rows["document"] == row["document"]
            parts = [t[1 : 1 + n] for t, n in zip(rows["tokens"][mine], rows["length"][mine], strict=True)]
            content = tokenizer.decode(np.concatenate(parts).tolist()).encode()
            assert content == (corpus / row["name"]).read_bytes()
            assert len(content) == row["size_bytes"]


def test_test_documents_are_sampled_as_they_were(prepared: tuple[Path, Path, dict[str, object]]) -> None:
    corpus, root, _ = prepared
    names = {row["document"]: row["name"] for row in pq.read_table(root / "documents.parquet").to_pylist()}
    tested = [
        row["document"] for row in pq.read_table(root / "documents.parquet").to_pylist() if row["split"] == "test"
    ]
    sampled = pq.read_table(root / "test_texts.parquet").to_pylist()
    assert [row["document"] for row in sampled] == tested
    for row in sampled:
        assert row["text"].encode() == (corpus / names[row["document"]]).read_bytes()[:4096]


def test_train_rows_are_the_train_documents(prepared: tuple[Path, Path, dict[str, object]]) -> None:
    corpus, root, _ = prepared
    manifest, tokenizer = Manifest.read(root), Tokenizer.from_file(str(root / "tokenizer.json"))
    listed = pq.read_table(root / "documents.parquet").to_pylist()
    shards = Shards(root, "train", ("sample_id", "document", "tokens", "length"))
    rows = shards.take(np.arange(shards.rows))
    assert np.array_equal(rows["sample_id"], np.arange(shards.rows))
    assert set(rows["document"]) == {-1}
    assert set(rows["length"]) == {manifest.positions}
    for split in manifest.splits:
        starts = Shards(root, split, (START,))
        assert set(starts.take(np.arange(starts.rows))[START]) == {manifest.start_id}
    texts = [(corpus / row["name"]).read_text() for row in listed if row["split"] == "train"]
    whole = "".join(texts)
    for tokens_S in rows["tokens"]:
        for piece in tokenizer.decode(tokens_S.tolist(), skip_special_tokens=False).split("<|endoftext|>"):
            assert piece in whole
    predicted = manifest.splits["train"].predictions
    everything = sum(len(tokenizer.encode(text).ids) for text in texts)
    most_lost = len(manifest.splits["train"].shards) * manifest.rows_per_group * manifest.positions + 2
    assert 0 <= everything - predicted <= most_lost


def test_the_same_content_gives_the_same_bytes(
    prepared: tuple[Path, Path, dict[str, object]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, root, _ = prepared
    monkeypatch.chdir(corpus.parent)  # the workers are elsewhere
    again = context(text_recipe(tmp_path, folder(corpus.name)), "again")
    prepare(again)
    assert hashes(Path(again.draft.uri)) == hashes(root)
    # Other names, another order, many parts: only the list of documents knows the names.
    monkeypatch.setattr(document_parts, "LEAST_PART_BYTES", 2000)
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    for i, path in enumerate(sorted(corpus.iterdir(), reverse=True)):
        (renamed / f"{i:03d}.txt").write_bytes(path.read_bytes())
    other = context(text_recipe(tmp_path, folder(renamed)), "other")
    prepare(other)
    found, expected = hashes(Path(other.draft.uri)), hashes(root)
    assert found.pop("documents.parquet") != expected.pop("documents.parquet")
    assert found == expected


def test_another_seed_permutes_the_rows(prepared: tuple[Path, Path, dict[str, object]], tmp_path: Path) -> None:
    corpus, root, _ = prepared
    given = context(text_recipe(tmp_path, folder(corpus), "seed=1"))
    prepare(given)
    other = Path(given.draft.uri)
    assert hashes(other)["test/00000.parquet"] == hashes(root)["test/00000.parquet"]
    one, two = (Shards(path, "train").take(np.arange(12))["tokens"] for path in (root, other))
    assert not np.array_equal(one, two)
    rows = Manifest.read(root).splits["train"].shards[0].rows
    sets = [{tuple(t) for t in Shards(path, "train").take(np.arange(rows))["tokens"]} for path in (root, other)]
    assert sets[0] == sets[1]


def test_json_lines_parquet_and_an_existing_tokenizer(
    prepared: tuple[Path, Path, dict[str, object]], tmp_path: Path
) -> None:
    corpus, root, _ = prepared
    texts = [path.read_text(errors="surrogateescape") for path in sorted(corpus.iterdir())]
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines/a.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    tokenizer = f"data.tokenizer={{kind: file, path: {root / 'tokenizer.json'}}}"
    given = context(text_recipe(tmp_path, f"{{kind: jsonl, path: {tmp_path / 'lines'}, field: body}}", tokenizer))
    metrics = prepare(given)
    assert metrics["dropped"] == {"empty": 1, "undecodable": 1, "duplicate": 1}
    found, expected = hashes(Path(given.draft.uri)), hashes(root)
    del found["documents.parquet"], expected["documents.parquet"]
    assert found == expected


def test_a_unigram_tokenizer_and_texts_that_its_engine_splits_otherwise(tmp_path: Path) -> None:
    """llama.cpp knows no bytes to fall back on beyond ASCII, nor NUL: the texts of the test split that hold such are
    counted, and the gate says how many they are.
    """
    corpus, given = tmp_path / "corpus", tmp_path / "model"
    write_corpus(corpus, 24)
    for number, odd in enumerate(ODD_TEXTS):
        (corpus / f"odd-{number:02d}.txt").write_bytes(odd.encode())
    given.mkdir()
    (given / "tokenizer.json").write_text(unigram(None), encoding="utf-8")
    tokenizer = f"data.tokenizer={{kind: file, path: {given}, end_token: </s>}}"
    asked = context(text_recipe(tmp_path / "store", folder(corpus), "data.test_fraction=0.6", tokenizer))
    metrics = prepare(asked)
    root = Path(asked.draft.uri)
    manifest, own = Manifest.read(root), Tokenizer.from_file(str(root / "tokenizer.json"))
    blank = sum(not odd.strip() for odd in ODD_TEXTS)
    assert metrics["dropped"] == {"empty": blank, "undecodable": 0, "duplicate": 0}
    assert (manifest.outputs, manifest.end_id) == (own.get_vocab_size(), own.token_to_id("</s>"))
    rows = Shards(root, "test", ("document", "tokens", "length"))
    columns = rows.take(np.arange(rows.rows))
    texts = [row["text"] for row in pq.read_table(root / "test_texts.parquet").to_pylist()]
    for document, text in zip(np.unique(columns["document"]), texts, strict=True):
        mine = columns["document"] == document
        lengths = zip(columns["tokens"][mine], columns["length"][mine], strict=True)
        ids = [id_ for tokens_S, length in lengths for id_ in tokens_S[1 : length + 1].tolist()]
        assert own.decode(ids, skip_special_tokens=False) == text

    model = build_model(asked.recipe.train.model, manifest, 0)
    save_model(model, model.config, tmp_path / "trained", root / "tokenizer.json")
    export_gguf(tmp_path / "trained", root / "tokenizer.json", tmp_path / "model.gguf", "f16", "unigram")
    engine = LlamaCpp(tmp_path / "model.gguf")
    found = split_otherwise(own, texts, [engine.tokenize(text) for text in texts])
    engine.close()
    no_bytes = {own.token_to_id(name) for name in (BYTE_NAMES[0], *BYTE_NAMES[0x80:])}
    counted = [text for text in texts if no_bytes & set(own.encode(text, add_special_tokens=False).ids)]
    assert 0 < len(counted) < len(texts)
    assert (found.value, found.n) == (len(counted) / len(texts), len(texts))
    measured = MeasuredFile(
        name="a", student=None, format="f16", size_bytes=1, candidate=True, sha256="0" * 64,
        metrics={"parity_nats": Metric(value=0.0, unit="nats", n=1), "split_otherwise": found},
    )  # fmt: skip
    passed, told = gate._parity(Parity(kind="parity", at_most=0.1), measured)
    assert not passed
    assert f"it splits {100 * found.value:.3g} % of {found.n} test documents into other tokens" in told


def test_a_remote_store_and_a_remote_source_and_nothing_that_was_written_is_read_back(
    prepared: tuple[Path, Path, dict[str, object]], s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyarrow import fs

    corpus, root, _ = prepared
    uri = s3_uri.replace("s3://", "s3://testing:testing@")  # the workers do not have this process's environment
    files, path = fs.FileSystem.from_uri(uri.replace("/store", "/corpus"))
    fs.copy_files(str(corpus), path, destination_filesystem=files)
    with faulty_bucket(uri) as (watched, server):
        given = context(text_recipe(watched, folder(uri.replace("/store", "/corpus"))))
        metrics = prepare(given)
        artifact: Artifact = given.draft.commit(metrics, 1.0)
        assert isinstance(artifact.record, Record)
        written = filesystem(artifact.uri)[1]
        read = {path.removeprefix(f"/{written}/") for method, path in server.requests if method == "GET"}
        assert any(name.startswith(f"{SCRATCH}/documents-") for name in read)  # what tasks read the server does see
        assert not read & artifact.record.files.keys()
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        assert hashes(artifact.local()) == hashes(root)


def test_one_large_document_among_four_is_prepared_evenly_and_never_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is longer than a piece, and lies in every train shard. Every phase reports while it goes on."""
    monkeypatch.setattr(heartbeat, "HEARTBEAT_S", 0.02)
    corpus = tmp_path / "corpus"
    write_corpus(corpus, documents=3)
    large = "".join(f"def f{i}(q):\n    return {i} * q\n\n" for i in range(36_000))
    (corpus / "large.txt").write_text(large)
    assert len(large) > PIECE_BYTES
    events: list[ProgressEvent] = []
    store, source = tmp_path / "store", folder(corpus)
    given = context(text_recipe(store, source), progress=events.append)
    prepare(given)
    reports = [event for event in events if isinstance(event, TaskProgress)]
    assert [report.done for report in reports] == sorted(report.done for report in reports)
    for phase, work in enumerate(
        ("reading 4 files", "tokenizer, from 2 documents", "tokenising 4 documents", "packing")
    ):
        notes = [report.note for report in reports if report.done == phase]
        assert any(re.fullmatch(rf"{work}.*, \d+ s", note) for note in notes), notes
    root = Path(given.draft.uri)
    splits = {row["name"]: row["split"] for row in pq.read_table(root / "documents.parquet").to_pylist()}
    assert set(splits.values()) == {"train", "validation", "test"}
    assert splits["large.txt"] == "train"
    rows = [shard.rows for shard in Manifest.read(root).splits["train"].shards]
    assert len(rows) == 2
    assert max(rows) - min(rows) <= Manifest.read(root).rows_per_group


def test_reading_holds_little_of_a_large_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not held, and is read again where its text is needed."""
    monkeypatch.setattr(document_parts, "HELD_BYTES", 4 * PIECE_BYTES)
    path = tmp_path / "large.txt"
    path.write_text("def f(x):\n    return x\n\n" * (48 * PIECE_BYTES // 24))
    source, reading = FolderSource(path=str(tmp_path)), Reading([])
    tracemalloc.start()
    (table,) = Reader("", source, None, 1).tables([FileSpan("large.txt")], reading)
    (row,) = table.to_pylist()
    batch, digest = table.to_batches()[0], hashlib.sha256()
    for piece in document_pieces(source, batch, 0):
        digest.update(piece)
    _, most_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most_bytes < 16 * PIECE_BYTES
    assert (row["content"], row["size_bytes"]) == (None, path.stat().st_size)
    assert row["sha256"].hex() == digest.hexdigest() == file_sha256(path)
    path.write_text(path.read_text() + "x")
    with pytest.raises(InputError, match=r"large\.txt: was changed while it was read"):
        list(document_pieces(source, batch, 0))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_large_file_is_split_and_its_rows_are_the_same(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into many parts and many files; that lines are named by their numbers, errors and duplicates show."""
    texts = [f"def f{i}(x):\n    return {i} * x  # \u00e9 \u2028\n" * (3 + i % 9) for i in range(90)] * 2
    lines = "".join(("\n" if i % 7 == 0 else "") + json.dumps({"text": t}) + "\n" for i, t in enumerate(texts))
    source, roots = f"{{kind: {kind}, path: {tmp_path / 'source'}}}", []
    (tmp_path / "source").mkdir()
    if kind == "jsonl":
        (tmp_path / "source/a.jsonl").write_text(lines)
    else:
        pq.write_table(pa.table({"text": texts}), tmp_path / "source/a.parquet", row_group_size=13)
    for name in ("whole", "split"):
        given = context(text_recipe(tmp_path / "store", source), name)
        prepare(given)
        roots.append(Path(given.draft.uri))
        monkeypatch.setattr(document_parts, "LEAST_PART_BYTES", 1500)
    assert document_parts.count_parts([SourceFile("a", len(lines), 0)], FolderSource(path="a")) > 10
    whole, split = map(hashes, roots)
    assert whole == split
    monkeypatch.setattr(shard_layout, "SHARD_BYTES", 2000)
    given = context(text_recipe(tmp_path / "store", source), "files")
    prepare(given)
    root = Path(given.draft.uri)
    for split_name, spread in Manifest.read(root).splits.items():
        assert len(spread.shards) > 2
        one, many = Shards(roots[0], split_name), Shards(root, split_name)
        rows = [set(map(bytes, each.take(np.arange(each.rows))["tokens"])) for each in (one, many)]
        assert rows[0] == rows[1] if split_name != "train" else len(rows[0]) == len(rows[1])
        assert one.rows == many.rows == spread.rows


def planted_corpus(generator: random.Random) -> tuple[list[str], list[str]]:
    """Texts that differ, some Chinese, with near-copies of held-out ones whose own hashes would put them into the train
    split; and these copies."""
    texts = [" ".join(f"w{generator.randrange(900)}" for _ in range(150)) for _ in range(30)]
    texts += ["".join(chr(0x4E00 + generator.randrange(900)) for _ in range(300)) for _ in range(15)]
    digests = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
    held_out = [text for text, split in zip(texts, split_of(digests, 0.2, 0.2), strict=True) if split != "train"]
    copies = []
    for text in held_out:
        for number in range(100):
            copy = f"{text} {number}"
            if int(hashlib.sha256(copy.encode()).hexdigest()[:8], 16) / 2**32 >= 0.4:
                copies.append(copy)
                break
    return texts + copies, copies


def test_near_copies_of_held_out_documents_are_left_out_whatever_the_order(tmp_path: Path) -> None:
    texts, copies = planted_corpus(random.Random(4))
    roots = []
    for order in ("as made", "reversed"):
        corpus = tmp_path / order
        corpus.mkdir()
        for number, text in enumerate(texts if order == "as made" else texts[::-1]):
            (corpus / f"{number:03d}.txt").write_text(text)
        told = list[ProgressEvent]()
        given = context(text_recipe(tmp_path / "store", folder(corpus)), order, told.append)
        metrics = prepare(given)
        begins = "left out, near-copies of held-out documents: "
        (names,) = (event.text for event in told if isinstance(event, Notice) and event.text.startswith(begins))
        first = names.removeprefix(begins).partition(", ")[0]
        assert (corpus / first).read_text() in copies
        assert metrics["dropped"]["near_duplicate"] == len(copies) > 5
        roots.append(Path(given.draft.uri))
    listed = [
        pq.read_table(root / "documents.parquet", columns=["document", "split", "sha256", "cluster"]) for root in roots
    ]
    assert listed[0].equals(listed[1])
    assert Manifest.read(roots[0]) == Manifest.read(roots[1])
    kept = set(listed[0]["sha256"].to_pylist())
    assert kept == {hashlib.sha256(text.encode()).hexdigest() for text in texts if text not in copies}
    found = Manifest.read(roots[0]).near_duplicates
    assert found is not None
    splits = listed[0]["split"].to_pylist()
    assert found.test_documents == splits.count("test") == found.test_clusters
    assert found.test_bytes_share == 1
    off = context(text_recipe(tmp_path / "store", folder(tmp_path / "as made"), "data.near_duplicates=null"), "off")
    assert prepare(off)["documents"] == len(texts)
    assert Manifest.read(Path(off.draft.uri)).near_duplicates is None


def refused(store: Path, source: str, message: str, *changes: str) -> None:
    given = context(text_recipe(store, source, *changes))
    with pytest.raises(InputError, match=message) as caught:
        prepare(given)
    assert type(caught.value) is InputError  # not Ray's double, whose message is a traceback
    assert not list(Path(given.draft.uri).iterdir())


def test_a_corpus_without_text_is_refused(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a.txt").write_text("")
    (corpus / "b.txt").write_bytes(b"\xff")
    refused(tmp_path, folder(corpus), r"0 documents are left \(1 empty, 1 undecodable, 0 duplicate\)")


@pytest.mark.parametrize("documents", [1, 2])
def test_fewer_documents_than_splits_are_refused(tmp_path: Path, documents: int) -> None:
    corpus = tmp_path / "corpus"
    write_corpus(corpus, documents)
    (corpus / "zz-copy.txt").write_bytes((corpus / "000.txt").read_bytes())
    message = rf"{documents} documents are left \(0 empty, 0 undecodable, 1 duplicate\); expected at least 3"
    refused(tmp_path, folder(corpus), message)


def test_a_corpus_too_small_for_its_shards_is_refused(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    write_corpus(corpus)
    refused(
        tmp_path,
        folder(corpus),
        r"the train split has \d+ tokens in \d+ documents, which fill 0 row groups",
        "data.rows_per_group=1000",
    )


def test_bad_files_are_named_without_a_traceback(tmp_path: Path) -> None:
    lines = tmp_path / "lines"
    lines.mkdir()
    (lines / "a.jsonl").write_text('{"text": "fine"}\n')
    (lines / "b.jsonl").write_text('{"text": "fine"}\n{"title": "x"}\n')
    refused(tmp_path, f"{{kind: jsonl, path: {lines}}}", r"b\.jsonl, line 2: found keys title; expected an object")
    refused(tmp_path, f"{{kind: parquet, path: {lines}}}", r"none of its 2 entries matches \*\.parquet")
    refused(tmp_path, folder(tmp_path / "none"), "not found; expected a folder")


def test_files_that_cannot_be_read_end_the_run_or_are_left_out_and_counted(tmp_path: Path) -> None:
    lines = tmp_path / "lines"
    lines.mkdir()
    for number in range(40):
        text = f"def f{number}(x):\n    return {number} * x\n" * (5 + number % 7)
        (lines / f"{number:02}.jsonl").write_text(json.dumps({"text": text}) + "\n\0\0\n")
    whole = (lines / "07.jsonl").read_bytes() * 50
    (lines / "x.jsonl.gz").write_bytes(gzip.compress(whole.replace(b"f7", b"half"))[:-20])
    (lines / "y.jsonl").write_bytes(whole.replace(b"f7", b"part") + b"[" * 100_000)
    (lines / "._00.jsonl").write_bytes(b"\0\5\x16\7")
    source = f"{{kind: jsonl, path: {lines}}}"
    refused(tmp_path, source, r"x\.jsonl\.gz: not gzip, cut short or damaged: ")
    told: list[ProgressEvent] = []
    given = context(text_recipe(tmp_path, source, "data.on_error=skip"), "skip", told.append)
    metrics = prepare(given)
    manifest = Manifest.read(Path(given.draft.uri))
    reasons = ["litter of file systems and programs", "compressed, and cut short, damaged or not gzip"]
    assert metrics["skipped"] == manifest.skipped == dict.fromkeys([*reasons, "JSON nested too deeply"], 1)
    assert metrics["documents"] == 40
    assert manifest.dropped["lines of NULs"] == 40
    assert f"1 file left out, {reasons[1]}: x.jsonl.gz" in [each.text for each in told if isinstance(each, Notice)]
