"""Text from files to shards, on a real cluster."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from corpus import context, text_recipe, write_corpus
from tokenizers import Tokenizer

from overproof.artifacts import Artifact, Record
from overproof.data import prepare as stage
from overproof.data.manifest import Manifest
from overproof.data.parquet_reader import Shards
from overproof.data.prepare import prepare
from overproof.errors import InputError
from overproof.files import file_sha256

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
    said: list[tuple[str, int, int, str]] = []
    given = context(
        text_recipe(tmp_path_factory.mktemp("store"), folder(corpus)), progress=lambda *word: said.append(word)
    )
    metrics = prepare(given)
    assert [done for _, done, _, _ in said] == [0, 1, 2, 3, 4]
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


def test_train_rows_are_the_train_documents(prepared: tuple[Path, Path, dict[str, object]]) -> None:
    corpus, root, _ = prepared
    manifest, tokenizer = Manifest.read(root), Tokenizer.from_file(str(root / "tokenizer.json"))
    listed = pq.read_table(root / "documents.parquet").to_pylist()
    shards = Shards(root, "train", ("sample_id", "document", "tokens", "length"))
    rows = shards.take(np.arange(shards.rows))
    assert np.array_equal(rows["sample_id"], np.arange(shards.rows))
    assert set(rows["document"]) == {-1}
    assert set(rows["length"]) == {manifest.sequence_length}
    texts = [(corpus / row["name"]).read_text() for row in listed if row["split"] == "train"]
    whole = "".join(texts)
    for tokens_S in rows["tokens"]:
        for piece in tokenizer.decode(tokens_S.tolist(), skip_special_tokens=False).split("<|endoftext|>"):
            assert piece in whole
    predicted = manifest.splits["train"].predictions
    everything = sum(len(tokenizer.encode(text).ids) + 1 for text in texts)
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
    # Other names, another order, other blocks: only the list of documents knows the names.
    monkeypatch.setattr(stage, "BLOCK_BYTES", 2000)
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


def test_a_remote_store_and_a_remote_source(
    prepared: tuple[Path, Path, dict[str, object]], s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyarrow import fs

    corpus, root, _ = prepared
    uri = s3_uri.replace("s3://", "s3://testing:testing@")  # the workers do not have this process's environment
    files, path = fs.FileSystem.from_uri(uri.replace("/store", "/corpus"))
    fs.copy_files(str(corpus), path, destination_filesystem=files)
    given = context(text_recipe(uri, folder(uri.replace("/store", "/corpus"))))
    metrics = prepare(given)
    artifact: Artifact = given.draft.commit(metrics, 1.0)
    assert isinstance(artifact.record, Record)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    found = hashes(artifact.local())
    del found["artifact.json"]
    assert found == hashes(root)


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
    refused(tmp_path, folder(corpus), r"no document is left \(1 empty, 1 undecodable, 0 duplicate\)")


@pytest.mark.parametrize("split", ["test", "validation", "train"])
def test_a_corpus_that_leaves_no_split_is_refused(tmp_path: Path, split: str) -> None:
    corpus = tmp_path / "corpus"
    write_corpus(corpus, documents=4)
    big = {"test": "validation", "validation": "test", "train": "test"}[split]
    rest = {"test": "train", "validation": "train", "train": "validation"}[split]
    share = {"train": 0.0001, "validation": 0.0001, "test": 0.0001} | {big: 0.5, rest: 0.4999}
    refused(
        tmp_path,
        folder(corpus),
        f"4 documents leave no {split} split",
        f"data.validation_fraction={share['validation']}",
        f"data.test_fraction={share['test']}",
    )


def test_a_shard_that_fills_no_row_group_is_refused(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    write_corpus(corpus)
    refused(tmp_path, folder(corpus), r"train shard 0 has \d+ tokens in \d+ documents", "data.rows_per_group=1000")


def test_bad_files_are_named_without_a_traceback(tmp_path: Path) -> None:
    lines = tmp_path / "lines"
    lines.mkdir()
    (lines / "a.jsonl").write_text('{"text": "fine"}\n')
    (lines / "b.jsonl").write_text('{"text": "fine"}\n{"title": "x"}\n')
    refused(tmp_path, f"{{kind: jsonl, path: {lines}}}", r"b\.jsonl, line 2: found keys title; expected an object")
    refused(tmp_path, f"{{kind: parquet, path: {lines}}}", r"none of its 2 entries matches \*\.parquet")
    refused(tmp_path, folder(tmp_path / "none"), "not found; expected a folder")
