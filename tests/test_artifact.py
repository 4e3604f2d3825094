"""Artifacts: identity, commit-last, verification, locking; on a folder and on a real S3 endpoint."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pyarrow import fs

from overproof.artifacts import RECORD, Artifact, Store, compute_fingerprint
from overproof.errors import InputError


def _make(store: Store, content: bytes = b"hello", recipe: str = "r", stage: str = "prepare") -> Artifact:
    print_ = compute_fingerprint(stage, 1, {"x": content.hex()}, {})
    draft = store.begin(recipe, stage, print_, {"x": 1}, {})
    with draft.directory() as folder:
        (folder / "sub").mkdir()
        (folder / "sub/part.bin").write_bytes(content)
    return draft.commit({"rows": 3}, 1.25)


def test_the_fingerprint_is_pinned_and_depends_on_each_part() -> None:
    base = compute_fingerprint("train", 1, {"steps": 2, "a": [1.5, None]}, {"prepare": "ab"})
    assert base == "b1d1c4611d2a3448855cc06076526f0b206d0ba4cca85be3fd8ac8dc48743e42"
    assert base == compute_fingerprint("train", 1, {"a": [1.5, None], "steps": 2}, {"prepare": "ab"})
    others = [
        compute_fingerprint("sweep", 1, {"steps": 2, "a": [1.5, None]}, {"prepare": "ab"}),
        compute_fingerprint("train", 2, {"steps": 2, "a": [1.5, None]}, {"prepare": "ab"}),
        compute_fingerprint("train", 1, {"steps": 3, "a": [1.5, None]}, {"prepare": "ab"}),
        compute_fingerprint("train", 1, {"steps": 2, "a": [1.5, None]}, {"prepare": "ac"}),
    ]
    assert len({base, *others}) == 5


def test_without_a_record_an_artifact_does_not_exist_and_the_next_attempt_starts_clean(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    print_ = compute_fingerprint("prepare", 1, {}, {})
    draft = store.begin("r", "prepare", print_, {}, {})
    with draft.directory() as folder:
        (folder / "half").write_text("half")
    assert store.find("r", "prepare", print_) is None
    assert store.artifacts() == []
    again = store.begin("r", "prepare", print_, {}, {}).commit({}, 0)
    assert list(again.record.files) == []
    assert store.find("r", "prepare", print_) == again


def test_a_changed_or_missing_file_is_named(tmp_path: Path) -> None:
    artifact = _make(Store(str(tmp_path)))
    artifact.verify()
    part = artifact.local() / "sub/part.bin"
    part.write_bytes(b"hellO")
    with pytest.raises(InputError, match=r"part\.bin: sha256 is .* the record says"):
        artifact.verify()
    part.unlink()
    with pytest.raises(InputError, match="missing, though its record lists it"):
        artifact.verify()


def test_get_finds_by_id_or_unique_part(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    one, two = _make(store, b"1"), _make(store, b"2", stage="train")
    assert store.get(one.id) == one
    assert store.get("train") == two
    with pytest.raises(InputError, match="expected one artifact"):
        store.get("r/")
    with pytest.raises(InputError, match="found none"):
        store.get("nothing")


def test_the_lock_is_exclusive_and_dies_with_its_process(tmp_path: Path) -> None:
    hold = (
        "import sys, time; from overproof.artifacts import Store\n"
        f"with Store({str(tmp_path)!r}).lock():\n print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True)
    assert holder.stdout
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(InputError, match=f"in use by process {holder.pid}"), Store(str(tmp_path)).lock():
        pass
    holder.kill()
    holder.wait()
    with Store(str(tmp_path)).lock():
        pass


def test_a_store_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"), Store(str(tmp_path / "file/store")).lock():
        pass
    with pytest.raises(InputError, match="expected a folder or a URI"):
        Store("nonsense://bucket/x").artifacts()


def test_the_same_store_on_s3(s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    store = Store(s3_uri)
    artifact = _make(store, b"remote")
    assert store.artifacts() == [artifact]
    assert (artifact.local() / "sub/part.bin").read_bytes() == b"remote"
    artifact.verify()
    remote, path = fs.FileSystem.from_uri(artifact.uri)
    with remote.open_output_stream(f"{path}/sub/part.bin") as stream:
        stream.write(b"remotE")
    with pytest.raises(InputError, match="sha256"):
        artifact.verify()
    remote.delete_file(f"{path}/{RECORD}")
    assert store.artifacts() == []
