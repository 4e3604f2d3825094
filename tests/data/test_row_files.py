"""Rows behind a URI: read by ranges, or fetched, and the same as those on a disk."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import fs
from tiny_shards import write_tiny_text

from overproof.artifacts import Artifact, Store
from overproof.data import row_files
from overproof.data.manifest import Manifest
from overproof.data.parquet_reader import Shards, planned_columns
from overproof.errors import InputError
from overproof.files import filesystem, join_uri

Remote = Callable[[Path], Artifact]


@pytest.fixture
def text_root(tmp_path: Path) -> Path:
    return write_tiny_text(tmp_path / "text")


@pytest.fixture
def remote(s3_uri: str) -> Remote:
    """Puts a folder into a bucket, as an artifact."""

    def copy(folder: Path) -> Artifact:
        writer = Store(s3_uri).new_writer("copied", "prepare", "0" * 64, {}, {})
        files, path = filesystem(writer.uri)
        fs.copy_files(str(folder), path, destination_filesystem=files)
        return writer.commit({}, 0.0)

    return copy


@pytest.mark.parametrize("whole_bytes", [0, 1 << 30], ids=["by ranges", "fetched"])
def test_remote_rows_are_those_on_a_disk(
    text_root: Path, remote: Remote, monkeypatch: pytest.MonkeyPatch, whole_bytes: int
) -> None:
    monkeypatch.setattr(row_files, "WHOLE_BYTES", whole_bytes)
    monkeypatch.setattr(row_files, "KEPT_BYTES", 1 << 14)
    artifact, draw = remote(text_root), np.random.default_rng(3)
    for columns in (None, ("length",), planned_columns(Manifest.read(text_root))):
        here = Shards(text_root, "train", columns)
        there = pickle.loads(pickle.dumps(Shards(artifact, "train", columns)))
        for size in (1, 40, here.rows):
            ids = draw.integers(0, here.rows, size)
            found, expected = there.take(ids), here.take(ids)
            assert found.keys() == expected.keys()
            assert all(np.array_equal(found[name], expected[name]) for name in expected)
    order = Manifest.read(artifact).order(1)
    steps = zip(there.steps(order, 4, 0, 30, 1, 2), here.steps(order, 4, 0, 30, 1, 2), strict=True)
    assert all(np.array_equal(a["tokens"], b["tokens"]) for a, b in steps)
    fetched = {path.name for path in artifact.local("manifest.json").rglob("*.parquet")}
    assert bool(fetched) == bool(whole_bytes)


def test_each_byte_that_is_asked_for_in_turn_is_read_about_once(
    text_root: Path, remote: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order of training: a row group is read once, whatever the batches cut it into, and a footer beside it."""
    monkeypatch.setattr(row_files, "WHOLE_BYTES", 0)
    shards = Shards(remote(text_root), "train")
    read = list[int]()
    original = row_files.RangedRows._read_group

    def count(self: row_files.RangedRows, group: int) -> bytes:
        content = original(self, group)
        read.append(len(content))
        return content

    monkeypatch.setattr(row_files.RangedRows, "_read_group", count)
    order = shards.manifest.order(2)
    batch = shards.manifest.rows_per_group // 2
    steps = order.rows // batch
    assert sum(1 for _ in shards.steps(order, batch, 0, steps)) == steps
    assert len(read) == order.groups
    rows = order.rows * sum(f.type.bit_width // 8 for f in shards.schema)
    assert rows <= sum(read) < 1.1 * rows + 100 * order.groups


def test_what_was_changed_after_it_was_written_is_refused(
    text_root: Path, remote: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = remote(text_root)
    name = Manifest.read(text_root).splits["train"].shards[0].path
    files, path = filesystem(join_uri(artifact.uri, name))
    content = (text_root / name).read_bytes()

    def rewrite(changed: bytes) -> None:
        with files.open_output_stream(path) as stream:
            stream.write(changed)

    rewrite(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InputError, match=r"sha256 is .* the record says .* changed after it was written"):
        Shards(artifact, "train").take(np.arange(3))
    assert not (artifact.local("manifest.json") / name).exists()
    monkeypatch.setattr(row_files, "WHOLE_BYTES", 0)
    rewrite(content + b"x")
    with pytest.raises(InputError, match=r"bytes of .* changed after it was written"):
        Shards(artifact, "train").take(np.arange(3))
    time.sleep(1.1)  # a bucket's clock has seconds
    rewrite(content)
    with pytest.raises(InputError, match="changed after it was written"):
        Shards(artifact, "train").take(np.arange(3))
    files.delete_file(path)
    with pytest.raises(InputError, match="missing, though its record lists it"):
        Shards(artifact, "train").take(np.arange(3))


def test_a_file_that_becomes_shorter_meanwhile_is_an_error(text_root: Path) -> None:
    path = text_root / Manifest.read(text_root).splits["train"].shards[0].path
    content = path.read_bytes()
    file = row_files.open_shard(path)
    places = row_files.ValuePlaces.find(file, str(path), ["length"], Manifest.read(text_root).rows_per_group)
    rows = row_files.RangedRows(pa.BufferReader(content[: places.spans[-1, 1] - 1]), places)
    with pytest.raises(InputError, match="the file became shorter"):
        rows.take("length", np.arange(file.metadata.num_rows))
