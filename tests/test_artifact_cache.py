"""Files of remote artifacts on this machine: which are fetched, and which go when there is no room."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from overproof import artifact_cache
from overproof.artifacts import Artifact, Store
from overproof.errors import InputError
from overproof.files import filesystem, write_file

CONTENT = {"manifest.json": b"{}", "train/0.bin": b"a" * 1000, "train/1.bin": b"b" * 1000, "test/0.bin": b"c" * 10}


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o700)
    monkeypatch.setattr(artifact_cache, "cache_root", lambda: folder)
    return folder


def made(uri: str, name: str, content: dict[str, bytes]) -> Artifact:
    writer = Store(uri).new_writer(name, "prepare", "0" * 64, {}, {})
    for file, bytes_ in content.items():
        write_file(writer.uri, file, bytes_)
    return writer.commit({}, 0.0)


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_what_is_asked_for_is_fetched_once_and_nothing_else(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = made(s3_uri, "one", CONTENT)
    fetched = list[str]()
    original = artifact_cache._fetch_file

    def count(*arguments: Any) -> None:
        fetched.append(arguments[3])
        original(*arguments)

    monkeypatch.setattr(artifact_cache, "_fetch_file", count)
    folder = artifact.local("manifest.json")
    assert files_of(folder) == {"manifest.json"}
    assert artifact.local_except("train/") == artifact.local("manifest.json", "test/") == folder
    assert files_of(folder) == {"manifest.json", "test/0.bin"}
    assert files_of(artifact.local("nothing/")) == {"manifest.json", "test/0.bin"}
    artifact.local()
    assert files_of(folder) == set(CONTENT)
    assert sorted(fetched) == sorted(CONTENT)
    with pytest.raises(InputError, match=r"x\.json: not among the artifact's files; found manifest\.json, "):
        artifact.local("x.json")


def test_a_changed_or_missing_file_is_refused_and_not_kept(s3_uri: str) -> None:
    artifact = made(s3_uri, "one", CONTENT)
    write_file(artifact.uri, "train/0.bin", b"z" * 1000)
    with pytest.raises(InputError, match=r"train/0\.bin: sha256 is .*…, the record says .*…; the file was changed"):
        artifact.local("train/")
    assert "train/0.bin" not in files_of(artifact.local("manifest.json"))
    files, path = filesystem(artifact.uri)
    files.delete_file(f"{path}/test/0.bin")
    with pytest.raises(InputError, match=r"test/0\.bin: missing, though its record lists it"):
        artifact.local("test/0.bin")


def test_what_was_used_longest_ago_makes_room_and_what_is_used_stays(
    s3_uri: str, own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each artifact takes 2,012 bytes; the first is used by another process, until it ends."""
    artifacts = [made(s3_uri, f"of-{number}", CONTENT) for number in range(4)]
    code = "from pathlib import Path; from overproof import artifact_cache; " \
        f"artifact_cache.cache_root = lambda: Path({str(own_folder)!r}); " \
        "from overproof.artifacts import Store; " \
        f"Store({s3_uri!r}).get('of-0/prepare').local(); print('up', flush=True); input()"  # fmt: skip
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdin
    assert other.stdout
    assert other.stdout.readline() == "up\n"
    monkeypatch.setattr(artifact_cache, "DISK_SHARE", 0.0)  # room for none beside those in use
    folders = [artifacts[0].local()]
    for artifact in artifacts[1:3]:
        folders.append(artifact.local())
        let_go(folders[-1])
    assert [bool(files_of(folder)) for folder in folders if folder.exists()] == [True, True]
    let_go(folders[0])
    artifacts[3].local()
    assert folders[0].exists()
    assert not folders[2].exists()
    other.stdin.close()
    other.wait()
    let_go(artifacts[3].local())
    assert files_of(artifacts[2].local("manifest.json")) == {"manifest.json"}
    assert not folders[0].exists()


def test_no_room_is_said(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = made(s3_uri, "one", CONTENT)
    monkeypatch.setattr(artifact_cache, "DISK_SHARE", 0.0)

    class Full:
        free = 5

    monkeypatch.setattr(artifact_cache.shutil, "disk_usage", lambda _: Full)
    with pytest.raises(InputError, match=r"2,012 bytes are to be fetched, and 5 are free; make room, or set TMPDIR"):
        artifact.local()
    assert artifact.local("nothing/")


def let_go(folder: Path) -> None:
    """As this process does when it ends."""
    artifact_cache._used.pop(folder).close()
