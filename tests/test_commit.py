"""The commit: by the hashes of those who wrote, one listing and no reading; and what it refuses."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import pytest
from pyarrow import fs

from finished import Run
from overproof.artifacts import RECORD, ArtifactWriter, Store, read_record
from overproof.errors import InputError
from overproof.files import FileEntry, filesystem

FINGERPRINT = "c" * 64


@pytest.fixture(params=["disk", "s3"])
def draft(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactWriter:
    """With files of all three ways to write, by whom they were hashed on the way."""
    uri = str(tmp_path / "store") if request.param == "disk" else request.getfixturevalue("s3_uri")
    writer = Store(uri).new_writer("r", "train", FINGERPRINT, {}, {})
    writer.write("manifest.json", b"{}")
    with writer.directory("model") as folder:
        (folder / "deep").mkdir()
        (folder / "deep/weights").write_bytes(b"w" * 3_000_000)
    of_worker = pickle.loads(pickle.dumps(writer))
    assert of_worker.handed_in == {}
    of_worker.write("shards/0", b"rows")
    writer.hand_in(of_worker.handed_in)
    return writer


def test_the_record_has_what_the_writers_hashed(draft: ArtifactWriter) -> None:
    artifact = draft.commit({}, 0.0)
    assert list(artifact.record.files) == ["manifest.json", "model/deep/weights", "shards/0"]
    assert artifact.record.files["shards/0"] == FileEntry(sha256=hashlib.sha256(b"rows").hexdigest(), size_bytes=4)
    artifact.verify()
    assert read_record(artifact.uri) == artifact.record


def cut(files: fs.FileSystem, root: str) -> None:
    with files.open_output_stream(f"{root}/model/deep/weights") as stream:
        stream.write(b"w" * 1_000_000)


def drop(files: fs.FileSystem, root: str) -> None:
    files.delete_file(f"{root}/shards/0")


def add(files: fs.FileSystem, root: str) -> None:
    with files.open_output_stream(f"{root}/shards/1") as stream:
        stream.write(b"rows")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (cut, r"model/deep/weights: found 1,000,000 bytes; expected the 3,000,000 that were written"),
        (drop, r"shards/0: found no such file; expected the 4 bytes that were written"),
        (add, r"shards/1: found 4 bytes; expected no such file, for nobody who wrote the artifact named it"),
    ],
)
def test_a_file_that_is_not_as_it_was_written_is_refused_and_nothing_recorded(
    draft: ArtifactWriter, change: Callable[[fs.FileSystem, str], None], told: str
) -> None:
    change(*filesystem(draft.uri))
    with pytest.raises(InputError, match=rf"{told}: .* nothing was recorded: run again$"):
        draft.commit({}, 0.0)
    assert read_record(draft.uri) is None


def test_a_folder_that_is_written_to_again_is_hashed_again_where_it_changed(draft: ArtifactWriter) -> None:
    with draft.directory() as folder:
        (folder / "manifest.json").write_bytes(b"[]")
    changed = draft.handed_in["manifest.json"]
    assert changed.sha256 == hashlib.sha256(b"[]").hexdigest()
    draft.commit({}, 0.0).verify()


def test_every_stage_of_a_run_hands_in_what_sha256sum_says(digits: Run) -> None:
    for artifact in digits.artifacts.values():
        root = artifact.local()
        found = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
        found.pop(RECORD)
        sums = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in found.items()}
        assert sums == {name: entry.sha256 for name, entry in artifact.record.files.items()}
    assert len(set(chain.from_iterable(artifact.record.files for artifact in digits.artifacts.values()))) > 30
