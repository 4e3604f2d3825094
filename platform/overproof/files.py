"""Files wherever they lie, on a disk or behind a URI that ``pyarrow.fs`` opens: their identity, and atomic writes."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar

from pyarrow import fs
from pydantic import BaseModel, ConfigDict, ValidationError

from overproof import hub
from overproof.errors import InputError

CHUNK_BYTES = 1 << 20
HASHING_THREADS = 4
OBJECT_STORES = ("s3", "gcs", "abfs")  # by the names that Arrow has for them
MAX_SOCKET_BYTES = 103  # of a path: 107 on Linux, 103 on macOS
SHORT_TEMP = Path("/tmp")
DISK_FAULTS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE})
TRANSIENT = re.compile(r"HTTP status 5\d\d|INTERNAL_FAILURE|SLOW_DOWN|SERVICE_UNAVAILABLE|NETWORK_CONNECTION|TIMEOUT")
RETRY_WAITS_S = (0.5, 1.0, 2.0)
Parsed = TypeVar("Parsed", bound=BaseModel)
Result = TypeVar("Result")

logger = logging.getLogger(__name__)


class FrozenModel(BaseModel):
    """A value in a JSON file of an artifact: closed, and never changed."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class FileEntry(FrozenModel):
    """The identity of one file."""

    sha256: str
    size_bytes: int

    @classmethod
    def of(cls, content: bytes) -> Self:
        """Of a file with these bytes."""
        return cls(sha256=hashlib.sha256(content).hexdigest(), size_bytes=len(content))


def filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    """Open a local path or a URI.

    Raises:
        InputError: the scheme is unknown or the URI is malformed, or the Hub has no such model.
    """
    if not is_unicode(uri):
        raise InputError(f"{shown_name(uri)}: its name is not UTF-8; expected one that is: rename it")
    if "\0" in uri:
        raise InputError(f"{uri!r}: holds a NUL, which no path does; expected a folder, file or URI")
    if "://" not in uri:
        return fs.LocalFileSystem(), os.path.normpath(Path(uri).expanduser().absolute())
    if hub.is_model(uri):
        return hub.open_file_system(uri)
    try:
        found, path = fs.FileSystem.from_uri(uri)
    except (ValueError, OSError) as error:
        raise InputError(f"{uri}: {error}; expected a folder or a URI that pyarrow.fs opens") from None
    return found, path


def storage_fault(error: BaseException) -> str | None:
    """What a disk or an object store said that cannot be written or read now; None where the fault lies elsewhere.

    Arrow's errors of a store have a text and no number.
    """
    cause = getattr(error, "cause", error)  # of what a Ray task raised, without the traceback in its text
    if not isinstance(cause, OSError) or not (
        cause.errno in DISK_FAULTS or (type(cause) is OSError and not cause.errno)
    ):
        return None
    return " ".join(str(cause).split())


def retried(action: Callable[[], Result], what: str) -> Result:
    """What ``action`` gives, done again after a while where an object store did not answer or had a fault of its own.

    Arrow tries again by itself, but not where the store's error is longer than the bytes it was to read.
    """
    for wait_s in RETRY_WAITS_S:
        try:
            return action()
        except OSError as error:
            fault = storage_fault(error)
            if fault is None or not TRANSIENT.search(fault):
                raise
            logger.warning("%s: %s; trying again in %g s", what, fault, wait_s)
            time.sleep(wait_s)
    return action()


def read_bytes(files: fs.FileSystem, path: str) -> bytes:
    """A small file's bytes.

    Raises:
        OSError: it cannot be read, with an object store not after several attempts.
    """

    def read() -> bytes:
        with files.open_input_stream(path) as stream:
            return bytes(stream.read())

    return retried(read, path)


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: half of a surrogate pair cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown_name(name: str) -> str:
    """A name that can be printed, whatever bytes it has."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def absolute_uri(uri: str) -> str:
    """The same folder, file or URI, whatever folder a process starts in; a model on the Hub is pinned to a commit."""
    if hub.is_model(uri):
        return hub.pin(uri)
    return uri if "://" in uri else filesystem(uri)[1]


def join_uri(uri: str, name: str) -> str:
    """A path below a folder or URI; what follows a ``?`` (endpoint, region) stays at the end."""
    head, mark, query = uri.partition("?")
    return f"{head.rstrip('/')}/{name}{mark}{query}"


def file_sha256(path: str | Path, files: fs.FileSystem | None = None) -> str:
    """Sha256 of a file's bytes, in hex."""
    return _hash_file(files or fs.LocalFileSystem(), str(path)).sha256


def _hash_file(files: fs.FileSystem, path: str) -> FileEntry:
    digest, size_bytes = hashlib.sha256(), 0
    with files.open_input_stream(path, buffer_size=CHUNK_BYTES) as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
            size_bytes += len(chunk)
    return FileEntry(sha256=digest.hexdigest(), size_bytes=size_bytes)


class HashingStream:
    """A stream to a file that hashes what goes through it: so nobody has to read the file again to know what it is."""

    closed = False  # it does not close the stream below; Arrow's writers ask

    def __init__(self, stream: Any) -> None:
        self._stream, self._digest, self._size = stream, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        self._digest.update(data)
        self._stream.write(data)
        count = memoryview(data).nbytes
        self._size += count
        return count

    def flush(self) -> None:
        self._stream.flush()

    def entry(self) -> FileEntry:
        """The identity of what was written so far."""
        return FileEntry(sha256=self._digest.hexdigest(), size_bytes=self._size)


@contextmanager
def hashed_file(files: fs.FileSystem, path: str) -> Iterator[HashingStream]:
    """A stream to a new file."""
    with files.open_output_stream(path) as stream:
        yield HashingStream(stream)


def write_file(uri: str, name: str, content: bytes) -> FileEntry:
    """Write one file below a folder or URI, making the folders above it."""
    files, path = filesystem(join_uri(uri, name))
    files.create_dir(path.rpartition("/")[0], recursive=True)
    with files.open_output_stream(path) as stream:
        stream.write(content)
    return FileEntry.of(content)


def cache_root() -> Path:
    """This user's folder of fetched artifacts and private copies, which no other user may write to."""
    folder = Path(tempfile.gettempdir()) / f"overproof-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()  # a link's is another's, who may point it elsewhere
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise InputError(f"{folder}: others may write there; expected a folder of your own: delete it, or set TMPDIR")
    return folder


def local_cache(key: str, make: Callable[[Path], None]) -> Path:
    """A folder of this machine under that key; the first process that needs it makes it, the others wait for it."""
    root = cache_root()
    with (root / f"{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / key).exists():
            attempt = Path(tempfile.mkdtemp(dir=root))
            try:
                make(attempt)
                attempt.rename(root / key)
            finally:
                shutil.rmtree(attempt, ignore_errors=True)
    return root / key


def socket_folder(names: str, prefix: str) -> Path:
    """A new folder, this user's alone, in which sockets of such names can lie: in TMPDIR, or where their paths would be
    too long in /tmp.

    Raises:
        InputError: they would be, and /tmp cannot be written to.
    """
    folder = Path(tempfile.gettempdir())
    if len(str(folder / f"{prefix}{'x' * 8}" / names).encode()) > MAX_SOCKET_BYTES:
        folder = SHORT_TEMP
    try:
        return Path(tempfile.mkdtemp(prefix=prefix, dir=folder))
    except OSError as error:
        raise InputError(
            f"TMPDIR: {tempfile.gettempdir()}: too long for sockets (paths of at most {MAX_SOCKET_BYTES} bytes), "
            f"and {folder}: {error.strerror}; set TMPDIR to a short folder that you may write to"
        ) from None


def atomic_write(files: fs.FileSystem, path: str, content: bytes, private: bool = False) -> None:
    """Write a small file so that readers see all of it or none, whoever else writes it, and after a power cut too; on a
    disk a ``private`` one is its user's alone.
    """
    if files.type_name in OBJECT_STORES:  # an object appears whole when its writer ends
        with files.open_output_stream(path) as stream:
            stream.write(content)
        return
    part = f"{path}.{secrets.token_hex(4)}.part"
    if private and isinstance(files, fs.LocalFileSystem):
        os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    with files.open_output_stream(part) as stream:
        stream.write(content)
    local = isinstance(files, fs.LocalFileSystem)
    if local:
        _flush_to_disk(Path(part))
    files.move(part, path)
    if local:
        _flush_to_disk(Path(path).parent)


@contextmanager
def whole_file(files: fs.FileSystem, path: str) -> Iterator[HashingStream]:
    """A stream to a large file, which on a disk has its name when all is written; in an object store it has it at once,
    and is whole only if the block ended well.
    """
    if files.type_name in OBJECT_STORES:  # an object appears when its writer ends, and moving one is to copy it
        with hashed_file(files, path) as stream:
            yield stream
        return
    part = f"{path}.{secrets.token_hex(4)}.part"  # another process may write the same file
    with hashed_file(files, part) as stream:
        yield stream
    files.move(part, path)


def flush_tree_to_disk(folder: Path) -> None:
    """Have every file and folder below a local folder, and its own entry, survive a power cut from here on."""
    for path in (*folder.rglob("*"), folder, folder.parent):
        _flush_to_disk(path)


def _flush_to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_sizes(files: fs.FileSystem, root: str) -> dict[str, int]:
    """Bytes of every file below a directory, by name: one listing."""
    listing = files.get_file_info(fs.FileSelector(root, recursive=True))
    return {i.path.removeprefix(root).lstrip("/"): i.size for i in listing if i.type == fs.FileType.File}


def hash_files(files: fs.FileSystem, root: str, names: Iterable[str]) -> dict[str, FileEntry]:
    """What these files below a directory are, by name: they are read, several at a time."""
    names = sorted(names)
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: _hash_file(files, f"{root}/{name}"), names), strict=True))


class FileChangedError(InputError):
    """A file is missing where it lies, or is not what its entry says."""


def require_same_file(root: str, name: str, entry: FileEntry, sha256: str | None) -> None:
    """Hold the sha256 that was found of a file below ``root``, or that there is none, against what it should be.

    Raises:
        FileChangedError: it is missing or differs.
    """
    if sha256 is None:
        raise FileChangedError(f"{root}/{name}: missing, though its record lists it; delete {root} and run again")
    if sha256 != entry.sha256:
        raise FileChangedError(
            f"{root}/{name}: sha256 is {sha256[:12]}…, the record says {entry.sha256[:12]}…; the file was changed "
            f"after it was written: delete {root} and run again"
        )


def verify_files(uri: str, entries: Mapping[str, FileEntry]) -> None:
    """Compare files below a directory with the sha256 each should have.

    Raises:
        FileChangedError: naming the first file that is missing or differs.
    """
    files, root = filesystem(uri)
    for name, found in mismatched_files(files, root, entries):
        require_same_file(root, name, entries[name], found)


def mismatched_files(
    files: fs.FileSystem, root: str, entries: Mapping[str, FileEntry]
) -> Iterator[tuple[str, str | None]]:
    """The files below a directory whose sha256 is not the listed one, by name; with what it is, None if missing."""

    def sha256_of(name: str) -> str | None:
        path = f"{root}/{name}"
        return file_sha256(path, files) if files.get_file_info(path).type == fs.FileType.File else None

    names = sorted(entries)
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        for name, found in zip(names, pool.map(sha256_of, names), strict=True):
            if found != entries[name].sha256:
                yield name, found


def first_validation_error(error: ValidationError) -> str:
    """Where the first fault of a JSON file lies, and what it is."""
    first = error.errors()[0]
    return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"


def parse_json(model: type[Parsed], content: bytes, where: str, expected: str) -> Parsed:
    """A JSON text.

    Raises:
        InputError: it is another.
    """
    try:
        return model.model_validate_json(content)
    except ValidationError as error:
        raise InputError(f"{where}: {first_validation_error(error)}; {expected}") from None


def read_json(model: type[Parsed], path: Path) -> Parsed:
    """Read one JSON part of an artifact.

    Raises:
        InputError: it is missing, or not what this version writes.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; delete its folder and run again") from None
    again = "expected what this version writes: delete its folder and run again"
    return parse_json(model, content, str(path), again)


def read_json_or_default(model: type[Parsed], uri: str, writer: str) -> Parsed:
    """Read a JSON file or URI that ``writer`` writes; where there is none, what an empty one would hold.

    Raises:
        InputError: it holds something else.
    """
    files, path = filesystem(uri)
    if files.get_file_info(path).type != fs.FileType.File:
        return model()
    return parse_json(model, read_bytes(files, path), uri, f"expected what `{writer}` writes")
