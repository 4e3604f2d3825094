"""Files of remote artifacts on this machine: each is fetched once, when it is asked for, and held against its hash.

They take a bounded share of the disk. Where another needs room, the artifacts go that were used longest ago and that no
process uses now: whoever was given a folder holds a lock on it, which the kernel lets go with the process.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from pyarrow import fs

from overproof.errors import InputError
from overproof.files import CHUNK_BYTES, FileEntry, cache_root, require_same_file, retried

DISK_SHARE = 0.5  # of what is free and what the fetched files take themselves
FETCHES = 8  # at a time
_used: dict[Path, IO[bytes]] = {}  # by folder: this process's hold on it


def fetch(files: fs.FileSystem, path: str, key: str, entries: Mapping[str, FileEntry]) -> Path:
    """A folder of this machine that has these files of the artifact at ``path``, which ``key`` identifies.

    Processes fetch different files at the same time, and each file once.

    Raises:
        FileChangedError: a file is missing or is not what its entry says.
        InputError: there is no room for it.
    """
    folder = _hold(key)
    missing = {name: entry for name, entry in entries.items() if not (folder / name).exists()}
    if missing:
        _make_room(folder, sum(entry.size_bytes for entry in missing.values()))
        with ThreadPoolExecutor(FETCHES) as pool:
            list(pool.map(lambda item: _fetch_file(files, path, folder, *item), missing.items()))
    return folder


def _fetch_file(files: fs.FileSystem, root: str, folder: Path, name: str, entry: FileEntry) -> None:
    target = folder / name
    part = target.with_name(f"{target.name}.part")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _held_part(part) as written:
            if target.exists():  # another process has fetched it meanwhile
                part.unlink()
                return
            sha256 = retried(lambda: _copy(files, f"{root}/{name}", written), f"{root}/{name}")
            if sha256 == entry.sha256:
                written.flush()
                part.replace(target)
                return
            part.unlink()
    except FileNotFoundError:
        sha256 = None
    except OSError as error:
        raise InputError(f"{root}/{name}: cannot be fetched to {folder}: {error}; run again to go on") from None
    require_same_file(root, name, entry, sha256)


def _copy(files: fs.FileSystem, source: str, target: IO[bytes]) -> str:
    """Sha256 of what was copied, from the beginning of both files."""
    digest = hashlib.sha256()
    target.truncate(0)
    with files.open_input_stream(source) as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
            target.write(chunk)
    return digest.hexdigest()


@contextmanager
def _held_part(part: Path) -> Iterator[IO[bytes]]:
    """The file that a fetch writes, held by this process alone."""
    while True:
        with part.open("ab") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if part.exists() and part.stat().st_ino == os.fstat(handle.fileno()).st_ino:  # not moved while we waited
                yield handle
                return


def _hold(key: str) -> Path:
    """The folder of an artifact, which stays as long as this process does."""
    root = cache_root() / "artifacts"
    folder = root / key
    if folder not in _used:
        root.mkdir(exist_ok=True)
        with _locked(root / "lock"):  # nobody deletes it between the two
            handle = folder.with_suffix(".used").open("ab")
            fcntl.flock(handle, fcntl.LOCK_SH)
            folder.mkdir(exist_ok=True)
        _used[folder] = handle
    os.utime(folder.with_suffix(".used"))
    return folder


def _make_room(folder: Path, needed_bytes: int) -> None:
    """Delete what was used longest ago and is not used now, until ``needed_bytes`` more keep to the share.

    Raises:
        InputError: all that could go is gone, and the disk has no room.
    """
    root = folder.parent
    with _locked(root / "lock"):
        sizes = {each: sum(_sizes(each)) for each in root.iterdir() if each.is_dir()}
        free, taken = shutil.disk_usage(root).free, sum(sizes.values())
        limit = DISK_SHARE * (free + taken)
        for other in sorted(sizes, key=lambda each: each.with_suffix(".used").stat().st_mtime):
            if taken + needed_bytes <= limit:
                return
            if other != folder and _delete_unused(other):
                taken, free = taken - sizes[other], free + sizes[other]
    if needed_bytes > free:
        raise InputError(
            f"{root}: {needed_bytes:,} bytes are to be fetched, and {free:,} are free; make room, or set TMPDIR to a "
            "folder of a larger disk"
        )


def _delete_unused(folder: Path) -> bool:
    with folder.with_suffix(".used").open("ab") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        shutil.rmtree(folder)
        return True


def _sizes(folder: Path) -> Iterator[int]:
    for path in folder.rglob("*"):
        if path.is_file():
            yield path.stat().st_size


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("ab") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def names_below(entries: Mapping[str, FileEntry], names: Sequence[str]) -> dict[str, FileEntry]:
    """The entries with these names, and of names that end in a slash all below, if any.

    Raises:
        InputError: there is none with a name.
    """
    found: dict[str, FileEntry] = {}
    for name in names:
        matching = {path: entry for path, entry in entries.items() if path == name or
                    (name.endswith("/") and path.startswith(name))}  # fmt: skip
        if not matching and not name.endswith("/"):
            raise InputError(f"{name}: not among the artifact's files; found {', '.join(sorted(entries)) or 'none'}")
        found |= matching
    return found
