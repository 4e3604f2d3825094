"""A package's files on this machine, as they were when they were hashed: they are served, whatever becomes of others.

``$TMPDIR/overproof-UID/packages`` holds each content once, ``by-sha256/HASH``, written while it was hashed, and a
folder ``HASH`` for each package, of hard links to it; nobody may write to either. A process keeps a shared lock on the
folder that it uses. Of those that none uses the last few stay, and fewer where the disk is full.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO

from overproof.errors import InputError
from overproof.files import HASHING_THREADS, FileEntry, cache_root, file_sha256
from overproof.package.contents import SHA256, Listing, PackageFolder, chunks, mismatch, read_listing

LOG = logging.getLogger(__name__)
KEPT_UNUSED = 2  # so that a version that was rolled back, or is restarted, is not copied again
TELL_EVERY_S = 4.0
STALE_S = 60.0  # after which what is being made and not locked is of an interrupted process
SPARE_BYTES = 64 << 20  # of the disk, which are left free
MAKING = ".making-"
MORE_ROOM = "make room, or set TMPDIR to a folder with more"
Say = Callable[[str], None]  # what is told of a long copy


class PrivateCopy:
    """A package's folder that this process has locked: it stays while this value lives."""

    def __init__(self, path: Path) -> None:
        """Raises FileNotFoundError where there is none, or where it is being deleted."""
        self.path = path
        self._lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        fcntl.flock(self._lock, fcntl.LOCK_SH)
        if not _is_at(self._lock, path):
            raise FileNotFoundError(path)
        os.utime(self._lock)

    def __del__(self) -> None:
        with suppress(AttributeError):  # it was never opened
            os.close(self._lock)


def find_copy(sha256: str) -> PrivateCopy | None:
    """The copy of a package with this content (``Listing.sha256``), if there is one."""
    if not re.fullmatch(SHA256, sha256):
        return None
    with suppress(FileNotFoundError):
        return PrivateCopy(_root() / sha256)
    return None


def find_verified_copy(sha256: str) -> PrivateCopy | None:
    """As ``find_copy``, hashed again: one that a disk has spoiled is deleted."""
    copy = find_copy(sha256)
    if copy is None:
        return None
    folder = PackageFolder(copy.path)
    try:
        listing = read_listing(folder)
        compare(folder, listing)
        if listing.sha256 == sha256:
            return copy
        LOG.warning("%s: holds %s; it is copied again", copy.path, listing.sha256)
    except InputError as error:
        LOG.warning("%s; it is copied again", error)
    _delete(copy.path)
    return None


def make_copy(folder: PackageFolder, listing: Listing, say: Say = LOG.info) -> PrivateCopy:
    """Copy a package, and compare each file's hash with the listed one.

    A local package is read whole in any case; of another only what lies here not yet.

    Raises:
        InputError: a file is not the listed one, or the disk is full.
    """
    path = _root() / listing.sha256
    with _turn(path.with_name(f"{listing.sha256}.lock")):
        while True:
            found = find_copy(listing.sha256)
            if found is not None:
                if folder.local:
                    compare(folder, listing, say)
                return found
            _make(path, folder, listing, say)
            with suppress(FileNotFoundError):  # another process has deleted it, for none used it yet
                made = PrivateCopy(path)
                delete_unused()
                return made


def delete_unused(keep: int = KEPT_UNUSED) -> None:
    """Delete the copies that no process uses, but the last few of them, and what interrupted processes left."""
    folders = [each for each in _root().iterdir() if each.is_dir() and each != _contents()]
    for path in sorted(folders, key=_used_s, reverse=True):
        made = not path.name.startswith(MAKING)
        with _alone_with(path) as alone:
            if alone and ((keep := keep - 1) < 0 if made else time.time() - _used_s(path) > STALE_S):
                _delete(path)
    for content in _contents().iterdir():
        with suppress(FileNotFoundError):
            if content.stat().st_nlink == 1:
                content.unlink()


def _make(path: Path, folder: PackageFolder, listing: Listing, say: Say) -> None:
    attempt = path.with_name(f"{MAKING}{secrets.token_hex(8)}")
    try:
        _make_room(folder, listing)
        attempt.mkdir(mode=0o700)
        lock = os.open(attempt, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(lock, fcntl.LOCK_SH)
            meter = _Meter(f"copying {listing.content.id}", listing, say)
            with ThreadPoolExecutor(HASHING_THREADS) as pool:
                list(pool.map(partial(_copy_file, attempt, folder, listing, meter), listing.files))
            attempt.chmod(0o500)
            os.fsync(lock)
            attempt.rename(path)
        finally:
            os.close(lock)
    except OSError as error:
        raise InputError(f"{folder}: cannot be copied to {path.parent}: {error.strerror}; {MORE_ROOM}") from None
    finally:
        if attempt.exists():
            _delete(attempt)


def _make_room(folder: PackageFolder, listing: Listing) -> None:
    """Raises InputError where the disk has not enough, whatever unused copies go."""
    new = {e.sha256: e.size_bytes for e in listing.files.values() if not (_contents() / e.sha256).exists()}
    needed = sum(new.values()) + SPARE_BYTES
    if shutil.disk_usage(_root()).free < needed:
        delete_unused(0)
    free = shutil.disk_usage(_root()).free
    if free < needed:
        has = f"{_root()} has {free / 1e6:,.0f} MB"
        raise InputError(f"{folder}: its private copy needs {needed / 1e6:,.0f} MB, and {has}; {MORE_ROOM}")


def _copy_file(attempt: Path, folder: PackageFolder, listing: Listing, meter: _Meter, name: str) -> None:
    entry, target = listing.files[name], attempt / name
    content = _contents() / entry.sha256
    if name in listing.small:
        with _new_file(target) as copy:
            copy.write(listing.small[name])
        return
    if _link(content, target, entry):
        if folder.local:
            _compare_file(folder, listing, meter, name)
        return
    digest = hashlib.sha256()
    with folder.open(name) as stream, _new_file(target) as copy:
        for chunk in chunks(stream, entry.size_bytes + 1):
            digest.update(chunk)
            copy.write(chunk)
            meter.add(len(chunk))
    if digest.hexdigest() != entry.sha256:
        raise mismatch(folder, name, digest.hexdigest(), entry)
    with suppress(FileExistsError):
        os.link(target, content)


def _link(content: Path, target: Path, entry: FileEntry) -> bool:
    """Take content that lies here already, if it does and is what its name says."""
    try:
        os.link(content, target)
    except FileNotFoundError:
        return False
    if file_sha256(target) == entry.sha256:
        return True
    target.unlink()
    content.unlink(missing_ok=True)
    return False


def compare(folder: PackageFolder, listing: Listing, say: Say = LOG.info) -> None:
    """Raises InputError where a file is not the listed one."""
    meter = _Meter(f"checking {listing.content.id}", listing, say)
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        list(pool.map(partial(_compare_file, folder, listing, meter), listing.content.files))


def _compare_file(folder: PackageFolder, listing: Listing, meter: _Meter, name: str) -> None:
    digest = hashlib.sha256()
    with folder.open(name) as stream:
        for chunk in chunks(stream):
            digest.update(chunk)
            meter.add(len(chunk))
    if digest.hexdigest() != listing.files[name].sha256:
        raise mismatch(folder, name, digest.hexdigest(), listing.files[name])


class _Meter:
    """Tells every few seconds how far a package is read."""

    def __init__(self, what: str, listing: Listing, say: Say) -> None:
        self._what, self._say = what, say
        self._total, self._done = sum(entry.size_bytes for entry in listing.content.files.values()), 0
        self._told_s, self._lock = time.monotonic(), threading.Lock()

    def add(self, size_bytes: int) -> None:
        with self._lock:
            self._done += size_bytes
            if time.monotonic() - self._told_s < TELL_EVERY_S:
                return
            self._told_s = time.monotonic()
            text = f"{self._what}: {self._done / 1e6:,.0f} of {self._total / 1e6:,.0f} MB"
        self._say(text)


@contextmanager
def _new_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write once, which nobody may write to afterwards, and which survives a power cut."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o400), "wb") as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())


@contextmanager
def _turn(path: Path) -> Iterator[None]:
    """One process at a time has this lock file, which is gone when none wants it."""
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if _is_at(lock, path):
                try:
                    yield
                finally:
                    path.unlink()
                return
        finally:
            os.close(lock)


@contextmanager
def _alone_with(path: Path) -> Iterator[bool]:
    """Whether no process uses a copy, and none does before this ends."""
    try:
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        yield False
        return
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone = True
        except BlockingIOError:
            alone = False
        yield alone
    finally:
        os.close(lock)


def _is_at(opened: int, path: Path) -> bool:
    """Whether an open file is still what has that name."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    return (found.st_dev, found.st_ino) == (os.fstat(opened).st_dev, os.fstat(opened).st_ino)


def _used_s(path: Path) -> float:
    with suppress(FileNotFoundError):
        return path.stat().st_mtime
    return 0.0


def _delete(path: Path) -> None:
    """Whoever waits for its lock finds nothing of its name; files that are mapped stay readable."""
    going = path.with_name(f"{MAKING}{secrets.token_hex(8)}")
    with suppress(FileNotFoundError):
        path.rename(going)
        going.chmod(0o700)
        shutil.rmtree(going, ignore_errors=True)


def _root() -> Path:
    root = cache_root() / "packages"
    root.mkdir(mode=0o700, exist_ok=True)
    return root


def _contents() -> Path:
    contents = _root() / "by-sha256"
    contents.mkdir(mode=0o700, exist_ok=True)
    return contents
