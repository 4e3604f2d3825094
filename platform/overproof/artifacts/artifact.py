"""A finished artifact: where it lies, its record, and its files on this machine."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from overproof.artifact_cache import fetch, names_below
from overproof.artifacts.record import RECORD, Record, artifact_id
from overproof.errors import InputError
from overproof.files import filesystem, verify_files


@dataclass(frozen=True)
class Artifact:
    """A finished artifact: where it lies and its record. Small and picklable."""

    uri: str
    record: Record

    @property
    def id(self) -> str:
        return artifact_id(self.record.recipe, self.record.stage, self.record.fingerprint)

    @property
    def size_bytes(self) -> int:
        """Of its files."""
        return sum(entry.size_bytes for entry in self.record.files.values())

    def size_of(self, name: str) -> int:
        """Bytes of one of its files.

        Raises:
            InputError: it has no such file.
        """
        (entry,) = names_below(self.record.files, [name]).values()
        return entry.size_bytes

    @property
    def content_sha256(self) -> str:
        """A hash of every file's name and hash."""
        listed = {path: entry.sha256 for path, entry in self.record.files.items()}
        return hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()

    @property
    def is_local(self) -> bool:
        """Whether it lies on a disk that this machine sees, and not behind a URI."""
        return isinstance(filesystem(self.uri)[0], fs.LocalFileSystem)

    def local(self, *names: str) -> Path:
        """The artifact's directory on this machine. Where the store is remote, it has the files with these names, and
        those below names that end in a slash; without names, all. Each is fetched once, and held against its hash.

        Raises:
            InputError: a file is not there, was changed, or does not fit on the disk.
        """
        files, path = filesystem(self.uri)
        if isinstance(files, fs.LocalFileSystem):
            return Path(path)
        key = hashlib.sha256(self.record.model_dump_json().encode()).hexdigest()  # built again, it is another artifact
        return fetch(files, path, key, names_below(self.record.files, names) if names else self.record.files)

    def local_except(self, *folders: str) -> Path:
        """The same, with all but what lies below these folders of it, each named with a slash at its end."""
        return self.local(*(name for name in self.record.files if not name.startswith(folders)))

    def open(self, name: str) -> pa.NativeFile:
        """A file of a remote artifact, to be read by ranges where it lies.

        Raises:
            InputError: it is not there, or was written after the record: by the clock and the sizes of its store.
        """
        files, path = filesystem(self.uri)
        record, found = files.get_file_info([f"{path}/{RECORD}", f"{path}/{name}"])
        if found.type != fs.FileType.File:
            raise InputError(f"{path}/{name}: missing, though its record lists it; delete {path} and run again")
        size_bytes = self.size_of(name)
        if found.size != size_bytes or (record.mtime_ns or 0) < (found.mtime_ns or 0):
            raise InputError(
                f"{path}/{name}: {found.size:,} bytes of {found.mtime}, and its record, of {record.mtime}, says "
                f"{size_bytes:,}; the file was changed after it was written: delete {path} and run again"
            )
        return files.open_input_file(found.path)

    def verify(self) -> None:
        """Hash every file again.

        Raises:
            InputError: a file is missing or differs from the record.
        """
        verify_files(self.uri, self.record.files)


def local_folder(source: Path | Artifact, *names: str) -> Path:
    """A folder as it is; that of an artifact with these files, see ``Artifact.local``."""
    return source.local(*names) if isinstance(source, Artifact) else source
