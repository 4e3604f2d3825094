"""Artifacts: identity, commit-last, verification, locking; on a folder and on a real S3 endpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pyarrow import fs

from overproof.artifacts import RECORD, RECORD_FORMAT, Artifact, ArtifactWriter, Store, compute_fingerprint
from overproof.cli.main import main
from overproof.errors import InputError
from overproof.files import filesystem, write_file


def _make(store: Store, content: bytes = b"hello", recipe: str = "r", stage: str = "prepare") -> Artifact:
    fingerprint = compute_fingerprint(stage, 1, {"x": content.hex()}, {})
    draft = store.new_writer(recipe, stage, fingerprint, {"x": 1}, {})
    with draft.directory() as folder:
        (folder / "sub").mkdir()
        (folder / "sub/part.bin").write_bytes(content)
    return draft.commit({"rows": 3}, 1.25)


def test_the_fingerfingerprintis_pinned_and_depends_on_each_part() -> None:
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
    fingerprint = compute_fingerprint("prepare", 1, {}, {})
    draft = store.new_writer("r", "prepare", fingerprint, {}, {})
    with draft.directory() as folder:
        (folder / "half").write_text("half")
    assert store.lookup("r", "prepare", fingerprint) is None
    assert store.artifacts() == []
    again = store.new_writer("r", "prepare", fingerprint, {}, {}).commit({}, 0)
    assert list(again.record.files) == []
    assert store.lookup("r", "prepare", fingerprint) == again


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
    for name, near in (("r/prepaer", "r/prepare"), ("trian", "train"), (f"{one.id[:-1]}z", one.id)):
        with pytest.raises(InputError, match=f"found none in {tmp_path}, nearest is '{near}'"):
            store.get(name)


def _record(**changes: object) -> bytes:
    record = {
        "format": RECORD_FORMAT, "recipe": "broken", "stage": "train", "fingerprint": "0" * 64, "config": None,
        "parents": {}, "files": {}, "metrics": {}, "seconds": 1.0, "created": "2026-01-01", "versions": {},
    }  # fmt: skip
    return json.dumps(record | changes).encode()


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "found 0 bytes, all of them NUL"),
        (b"\0" * 700, "found 700 bytes, all of them NUL"),
        (b"\xff\xfe", r"which is no JSON"),
        (_record()[:-40], "which is no JSON"),
        (b"[" * 100_000, "which is no JSON"),
        (b"[1, 2]", "JSON without a format"),
        (_record(color="red"), "color: Extra inputs are not permitted"),
        (_record(files={"a": {"sha256": "0"}}), "files.a.size_bytes: Field required"),
        (_record(format=RECORD_FORMAT + 1), f"found format {RECORD_FORMAT + 1}, and this version reads"),
        (_record(format=1, color="red"), "found format 1, and this version reads 2; run its recipe again"),
        (_record(format="x"), "found format 'x'"),
    ],
)  # fmt: skip
def test_a_record_that_cannot_be_read_is_told_of_on_one_line_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, found: str
) -> None:
    store = Store(str(tmp_path))
    sound = _make(store)
    path = tmp_path / "broken/train-00000000" / RECORD
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    for argv in (["ls"], ["show", "prepare"]):
        assert main([*argv, "--store", str(tmp_path)]) == 0
        printed = capsys.readouterr()
        assert sound.id in printed.out
        assert printed.err.startswith(f"overproof: warning: {path}: ")
        assert found in printed.err
        assert printed.err.count("\n") == 1
    assert store.artifacts() == [sound]
    assert store.get("prepare") == sound
    assert store.lookup("broken", "train", "0" * 64) is None
    capsys.readouterr()
    for named in ("broken/train", str(path.parent)):  # asked for by name, it is the answer
        assert main(["show", named, "--store", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"overproof: {path}: ")
        assert found in error
    draft = store.new_writer("broken", "train", "0" * 64, None, {})
    assert store.lookup("broken", "train", "0" * 64) is None
    assert draft.commit({}, 0) == store.lookup("broken", "train", "0" * 64)


def test_a_record_that_may_not_be_opened_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Store(str(tmp_path))
    sound = _make(store)
    (tmp_path / "r/train-00000000").mkdir()
    (tmp_path / "r/train-00000000" / RECORD).symlink_to("/proc/self/mem")  # opened, it cannot be read at its start
    assert store.artifacts() == [sound]
    assert "cannot be read" in caplog.text


def test_everything_is_on_the_disk_before_the_record_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []
    really_flush = os.fsync

    def fsync(handle: int) -> None:
        flushed.append(str(Path(f"/proc/self/fd/{handle}").readlink().relative_to(tmp_path)))
        really_flush(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    artifact = _make(Store(str(tmp_path)))
    record = next(i for i, name in enumerate(flushed) if RECORD in name)
    folder = artifact.id
    assert set(flushed[:record]) == {"r", folder, f"{folder}/sub", f"{folder}/sub/part.bin"}
    assert flushed[record + 1 :] == [folder]  # and with it the name of the record


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


@pytest.mark.parametrize("where", ["disk", "s3"])
def test_what_is_marked_as_finished_stays_for_the_next_attempt(
    where: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    uri = str(tmp_path) if where == "disk" else request.getfixturevalue("s3_uri")
    store, fingerprint, edited = Store(uri), "1" * 64, "2" * 64

    def names(writer: ArtifactWriter) -> set[str]:
        files, path = filesystem(writer.uri)
        found = files.get_file_info(fs.FileSelector(path, recursive=True, allow_not_found=True))
        return {info.base_name for info in found if info.type == fs.FileType.File}

    for each in (fingerprint, edited):
        writer = store.new_writer("kept", "cache", each, {}, {})
        for name in ("0.parquet", "1.parquet", "deeper/2.parquet"):
            write_file(writer.uri, name, b"rows")
        write_file(writer.marks, "0.parquet.json", b"{}")
        assert names(store.new_writer("kept", "cache", each, {}, {})) == {"0.parquet"}
        writer.discard()
        assert names(writer) == {"0.parquet"}
    left = store.new_writer("kept", "cache", edited, {}, {})
    artifact = store.new_writer("kept", "cache", fingerprint, {}, {}).commit({}, 0.0)
    assert set(artifact.record.files) == {"0.parquet"}
    assert names(left) == set()
    assert [each.id for each in store.artifacts()] == [artifact.id]
    assert not store.unfinished()
