"""The files of a folder of data: which are read, which are left out and why, and how one is opened.

Every task lists and opens the files of its data here, and `shrink` and `plan` with them. A file is known by the end of
its name, in whatever case; what it is compressed with is a further end of it. Links that lead out of the folder, or to
what is read where it lies, are left out, so that no listing loops.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, TypeVar

import pyarrow as pa
from pyarrow import fs

from overproof.errors import InputError
from overproof.files import filesystem, is_unicode, shown_name
from overproof.units import format_count

OnError = Literal["fail", "skip"]
T = TypeVar("T")

COMPRESSIONS: Mapping[str, str] = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}  # Arrow's names
OTHER_COMPRESSIONS = (".xz", ".lzma", ".lz4", ".br", ".snappy", ".z", ".zip", ".7z", ".rar", ".tar")
# Further ends of names that say the same.
SPELLINGS: Mapping[str, tuple[str, ...]] = {".jsonl": (".jsonl", ".ndjson"), ".parquet": (".parquet", ".parq", ".pq")}
KNOWN = {spelling: suffix for suffix, spellings in SPELLINGS.items() for spelling in spellings}
LITTER_NAMES = frozenset(
    [
        "__macosx", "thumbs.db", "desktop.ini", "$recycle.bin", "system volume information", "lost+found", "@eadir",
        "__pycache__", "_success", "_metadata", "_common_metadata",
    ]
)  # fmt: skip

LITTER = "litter of file systems and programs"
LINK_OUT, LINK_INSIDE, LINK_TO_NOTHING = (
    "links out of the folder", "links to what is read where it lies", "links to nothing",
)  # fmt: skip
NO_FILE = "no files, but pipes, sockets or devices"
BAD_NAME = "names that are not UTF-8"
OTHER_COMPRESSION = f"compressed otherwise than as {', '.join(COMPRESSIONS)}"
PACKED_PARQUET = "Parquet that is compressed once more as a whole"
UNREADABLE = "not what the recipe says"  # of a fault that has no reason of its own
PACKED = ".parquet, packed"
LISTED = 3  # names in a message


class UnreadableFile(InputError):
    """A file is damaged, or not what its name says; ``reason`` is what such files are counted under."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, order=True)
class SourceFile:
    """One file of a source; the name is relative to the source's root."""

    name: str
    size_bytes: int
    mtime_ns: int


@dataclass(frozen=True)
class FileListing:
    """The files of a source by name, and those left out, by the reason."""

    root: str  # the folder that names are relative to, on its file system
    files: tuple[SourceFile, ...]
    skipped: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def path(self, file: SourceFile) -> str:
        """Of a file, on its file system."""
        return f"{self.root}/{file.name}"

    @property
    def identity(self) -> list[list[Any]]:
        """What changes when the files do."""
        return [[file.name, file.size_bytes, file.mtime_ns] for file in self.files]


def describe_skipped(skipped: Mapping[str, Iterable[str]]) -> list[str]:
    """A line for each reason: how many files, and some of them."""
    lines = []
    for reason, names in skipped.items():
        found = list(names)
        shown = ", ".join(found[:LISTED]) + (", ..." if len(found) > LISTED else "")
        lines.append(f"{format_count(len(found), 'file')} left out, {reason}: {shown}")
    return lines


# --- names ----------------------------------------------------------------------------------------


def compression_of(name: str) -> str | None:
    """What a file is compressed with, by its name: Arrow's name of it."""
    return next((codec for suffix, codec in COMPRESSIONS.items() if name.lower().endswith(suffix)), None)


def data_name(name: str) -> str:
    """A file's name without the end that tells of its compression."""
    return name.rpartition(".")[0] if compression_of(name) else name


def data_suffix(name: str) -> str:
    """How a file's name ends, in lower case and one spelling, its compression left out: ``.jsonl`` of ``A.NDJSON.gz``;
    empty where it has no end.
    """
    _, dot, end = data_name(name.rpartition("/")[2]).lower().rpartition(".")
    suffix = KNOWN.get(dot + end, dot + end) if dot else ""
    # Parquet is read from its end, and compresses its own pages.
    return PACKED if suffix == ".parquet" and compression_of(name) else suffix


def is_litter(name: str) -> bool:
    """Whether a file or folder is none of the data: hidden, or written by a file system or program for itself."""
    return name.startswith(".") or name.endswith("~") or name.lower() in LITTER_NAMES


Choose = Callable[[str], str | None]  # from a name, why the file is not read; None where it is


def any_name(name: str) -> str | None:
    """Takes every file."""
    del name
    return None


def having_suffix(*suffixes: str) -> Choose:
    """Takes files whose names end so (see ``data_suffix``)."""
    spelled = " or ".join(end for suffix in suffixes for end in SPELLINGS.get(suffix, (suffix,)))

    def choose(name: str) -> str | None:
        if data_suffix(name) in suffixes:
            return None
        if data_suffix(name) == PACKED and ".parquet" in suffixes:
            return PACKED_PARQUET
        stem, dot, end = name.rpartition(".")
        if dot + end.lower() in OTHER_COMPRESSIONS and data_suffix(stem) in suffixes:
            return OTHER_COMPRESSION
        return f"not {spelled}"

    return choose


def matching(*patterns: str) -> Choose:
    """Takes files whose names match a pattern, in any case, with or without the end that tells of a compression."""
    expected = " or ".join(patterns)

    def choose(name: str) -> str | None:
        base = name.rpartition("/")[2].lower()
        matches = any(fnmatchcase(each, glob.lower()) for each in (base, data_name(base)) for glob in patterns)
        return None if matches else f"not {expected}"

    return choose


# --- listing --------------------------------------------------------------------------------------


def list_source(path: str, choose: Choose, expected: str, on_error: OnError = "fail", field: str = "data.source.path",
                ) -> FileListing:  # fmt: skip
    """A file, or those below a folder that are chosen.

    Raises:
        InputError: there is nothing, or nothing is chosen: ``expected`` says what would be. A chosen file's name is not
            UTF-8, unless such are skipped.
    """
    listing = list_all(path, choose, expected, on_error, field)
    if not listing.files:
        entries = sum(map(len, listing.skipped.values()))
        why = "".join(f"; {line}" for line in describe_skipped(listing.skipped))
        raise InputError(
            f"{field}: {path}: none of its {entries} entries matches {expected}; expected at least one such file{why}"
        )
    return listing


def list_suffix(path: str, suffix: str, on_error: OnError = "fail") -> FileListing:
    """A file, or those below a folder whose names end so: see ``list_source``."""
    return list_source(path, having_suffix(suffix), f"*{suffix}", on_error)


def list_all(path: str, choose: Choose, expected: str, on_error: OnError = "fail", field: str = "data.source.path",
             ) -> FileListing:  # fmt: skip
    """As ``list_source``, and nothing chosen is no error."""
    files, root = filesystem(path)
    try:
        info = files.get_file_info(root)
        if info.type == fs.FileType.NotFound:
            raise InputError(f"{field}: {path}: not found; expected a folder that holds {expected}")
        if info.type == fs.FileType.Unknown:
            raise InputError(f"{field}: {path}: is a pipe, socket or device; expected a file or a folder")
        if info.type == fs.FileType.File:
            return FileListing(root.rpartition("/")[0], (SourceFile(info.base_name, info.size, info.mtime_ns or 0),))
        root = root.rstrip("/")
        if isinstance(files, fs.LocalFileSystem):
            entries, skipped = _walk(root or "/")
        else:
            entries, skipped = _remote(files, root)
    except OSError as error:
        raise InputError(f"{field}: {path}: {_first_line(error)}; expected a folder that can be read") from None
    chosen = list[_Entry]()
    for entry in entries:
        if reason := choose(entry.file.name):
            skipped.append((reason, entry.file.name))
        elif is_unicode(entry.file.name):
            chosen.append(entry)
        elif on_error == "skip":
            skipped.append((BAD_NAME, entry.file.name))
        else:
            raise UnreadableFile(
                f"{root}/{shown_name(entry.file.name)}: its name is not UTF-8; expected one that is: rename it, or "
                "leave such files out with data.on_error: skip",
                BAD_NAME,
            )
    found = list[SourceFile]()
    seen = {entry.target for entry in chosen if not entry.is_link}
    for entry in sorted(chosen, key=lambda each: each.file):
        if not entry.is_link or entry.target not in seen:
            seen.add(entry.target)
            found.append(entry.file)
        else:
            skipped.append((LINK_INSIDE, entry.file.name))
    by_reason: dict[str, list[str]] = {}
    for reason, name in sorted(skipped):
        by_reason.setdefault(reason, []).append(shown_name(name))
    return FileListing(root, tuple(found), {reason: tuple(names) for reason, names in by_reason.items()})


@dataclass(frozen=True)
class _Entry:
    file: SourceFile
    target: str  # the path that it really has
    is_link: bool


Skips = list[tuple[str, str]]  # the reason and the name


def _walk(root: str) -> tuple[list[_Entry], Skips]:
    """What lies below a folder of this machine: files, and links to files below it."""
    real = os.path.realpath(root).rstrip("/")
    found, skipped, folders = list[_Entry](), list[tuple[str, str]](), [""]
    while folders:
        folder = folders.pop()
        with os.scandir(f"{root}/{folder}") as entries:
            for entry in entries:
                name = folder + entry.name
                if is_litter(entry.name):
                    skipped.append((LITTER, name))
                elif entry.is_symlink():
                    target = os.path.realpath(entry.path)
                    reason = _why_not_followed(target, real)
                    if reason:
                        skipped.append((reason, name))
                    else:
                        found.append(_Entry(_source_file(name, Path(target).stat()), target, is_link=True))
                elif entry.is_dir():
                    folders.append(f"{name}/")
                elif entry.is_file():
                    file = _source_file(name, entry.stat())
                    found.append(_Entry(file, f"{real}/{name}", is_link=False))
                else:
                    skipped.append((NO_FILE, name))
    return found, skipped


def _why_not_followed(target: str, real: str) -> str | None:
    try:
        mode = Path(target).stat().st_mode
    except OSError:  # there is none, or it leads to itself
        return LINK_TO_NOTHING
    if not target.startswith(f"{real}/") and target != real:
        return LINK_OUT
    if stat.S_ISREG(mode):
        return None
    return LINK_INSIDE if stat.S_ISDIR(mode) else NO_FILE


def _source_file(name: str, found: os.stat_result) -> SourceFile:
    return SourceFile(name, found.st_size, found.st_mtime_ns)


def _remote(files: fs.FileSystem, root: str) -> tuple[list[_Entry], Skips]:
    found, skipped = list[_Entry](), list[tuple[str, str]]()
    for info in files.get_file_info(fs.FileSelector(root, recursive=True)):
        name = info.path.removeprefix(root).lstrip("/")
        if info.type != fs.FileType.File:
            continue
        if any(map(is_litter, name.split("/"))):
            skipped.append((LITTER, name))
        else:
            found.append(_Entry(SourceFile(name, info.size, info.mtime_ns or 0), info.path, is_link=False))
    return found, skipped


# --- reading --------------------------------------------------------------------------------------


def open_content(files: fs.FileSystem, path: str) -> Any:
    """A file's content as a stream of bytes, decompressed as its name says.

    Raises:
        OSError: it is empty, and should be compressed; what else the file system says.
    """
    compression = compression_of(path)
    if compression and files.get_file_info(path).size == 0:
        raise OSError("it is empty")
    return files.open_input_stream(path, compression=compression)


@contextmanager
def naming_faults(path: str, what: str) -> Iterator[None]:
    """Whatever is found wrong with a file of the kind ``what`` while it is read, as one error that names it.

    Raises:
        UnreadableFile: in place of what Arrow, Python's decoders or the file system raised.
    """
    try:
        yield
    except UnicodeDecodeError as error:
        raise UnreadableFile(f"{path}: not UTF-8: {error}; expected text in UTF-8", "not UTF-8") from None
    except RecursionError:
        raise UnreadableFile(f"{path}: nested too deeply; expected {what}", "nested too deeply") from None
    except PermissionError:
        raise UnreadableFile(f"{path}: may not be read; expected a file of this user's", "may not be read") from None
    except (pa.ArrowException, OSError, EOFError, ValueError) as error:
        compression = compression_of(path)
        if compression and isinstance(error, OSError):
            raise UnreadableFile(
                f"{path}: not {compression}, cut short or damaged: {_first_line(error)}; expected a whole file of the "
                "compression that its name tells",
                f"compressed, and cut short, damaged or not {compression}",
            ) from None
        raise UnreadableFile(
            f"{path}: not {what}: {_first_line(error)}; expected a whole file of what its name tells",
            f"damaged, or not {what}",
        ) from None


@dataclass
class SourceReading:
    """A pass over the files of a source, and what it left out."""

    listing: FileListing
    on_error: OnError = "fail"
    skipped: dict[str, list[str]] = field(default_factory=dict)  # files by reason, those of the listing among them
    nul_lines: int = 0  # of JSON Lines, dropped

    def __post_init__(self) -> None:
        self.skipped |= {reason: list(names) for reason, names in self.listing.skipped.items()}

    def each_file(self, read: Callable[[SourceFile], Iterable[T]]) -> Iterator[T]:
        """What ``read`` gives of each file; nothing of one that cannot be read, where such are skipped: what a file
        gives is then held until it is known to be whole.

        Raises:
            InputError: a file cannot be read and none is to be skipped, or none can be read.
        """
        first: InputError | None = None
        read_one = False
        for file in self.listing.files:
            if self.on_error == "fail":
                yield from read(file)
                continue
            nul_lines = self.nul_lines
            try:
                found = list(read(file))
            except InputError as error:
                self.nul_lines = nul_lines
                self.skipped.setdefault(reason_of(error), []).append(file.name)
                first = first or error
                continue
            read_one = True
            yield from found
        if first is not None and not read_one:
            raise first

    @property
    def counts(self) -> dict[str, int]:
        """Files left out, by reason."""
        return {reason: len(names) for reason, names in self.skipped.items()}


def reason_of(error: InputError) -> str:
    """What a file is counted under that was skipped for this error."""
    return error.reason if isinstance(error, UnreadableFile) else UNREADABLE


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
