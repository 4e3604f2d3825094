"""Artifacts: what a stage leaves behind, with its identity, its record and its parents.

An artifact is the directory ``<store>/<recipe name>/<stage>-<8 hex of the fingerprint>/``. Its record,
``artifact.json``, is written last and atomically: a directory without a record does not exist. A store is a
local folder or any URI that ``pyarrow.fs`` opens.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
from pyarrow import fs
from pydantic import BaseModel, ConfigDict, ValidationError

from overproof.artifact_cache import fetch, names_below
from overproof.errors import InputError, suggest_name
from overproof.files import (
    OBJECT_STORES,
    FileEntry,
    absolute_uri,
    atomic_write,
    file_entries,
    filesystem,
    first_validation_error,
    flush_tree_to_disk,
    join_uri,
    read_bytes,
    verify_files,
)

logger = logging.getLogger(__name__)

RECORD = "artifact.json"
RECORD_FORMAT = 2  # goes up with what a record holds, and with what fingerprints are made of
WORK = ".work"  # ends the name of a folder in which a stage has what it goes on from
TOOLS = ("overproof", "ray", "deepspeed", "torch", "transformers", "pyarrow", "gguf", "xllamacpp", "onnxruntime")


class StoreUnavailable(InputError):
    """What a store holds cannot be told now: it may well be there, and whole."""


class Record(BaseModel):
    """The content of ``artifact.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    format: int = RECORD_FORMAT
    recipe: str
    stage: str
    fingerprint: str
    config: Any
    parents: dict[str, str]  # stage -> fingerprint
    files: dict[str, FileEntry]
    metrics: dict[str, Any]
    seconds: float
    created: str  # UTC, ISO 8601
    versions: dict[str, str]


def read_record(uri: str) -> Record | None:
    """The record of the artifact at a folder or URI; None where there is none.

    Raises:
        InputError: there is a file, and it is not what this version writes.
    """
    files, folder = filesystem(uri)
    path = f"{folder}/{RECORD}"
    expected = "expected the record of a finished artifact: run its recipe again"
    try:
        content = read_bytes(files, path)
    except FileNotFoundError:
        return None
    except OSError as error:
        if files.type_name in OBJECT_STORES:
            raise StoreUnavailable(f"{uri}: cannot be read: {error}; run again when it can") from None
        raise InputError(f"{path}: cannot be read: {error}; {expected}") from None
    if not content.strip(b"\0"):
        raise InputError(f"{path}: found {len(content)} bytes, all of them NUL; {expected}")
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        raise InputError(f"{path}: found {content[:20]!r}…, which is no JSON; {expected}") from None
    if not isinstance(tree, dict) or "format" not in tree:
        raise InputError(f"{path}: found JSON without a format; {expected}")
    if tree["format"] != RECORD_FORMAT:
        raise InputError(
            f"{path}: found format {tree['format']!r}, and this version reads {RECORD_FORMAT}; run its recipe again, "
            "or use the version that wrote it"
        )
    try:
        return Record.model_validate(tree)
    except ValidationError as error:
        raise InputError(f"{path}: {first_validation_error(error)}; {expected}") from None


def compute_fingerprint(stage: str, format: int, config: Any, parents: Mapping[str, str]) -> str:
    """Sha256 over the stage, its format version, its part of the recipe and its parents' fingerprints."""
    return json_sha256({"stage": stage, "format": format, "config": config, "parents": dict(parents)})


def json_sha256(value: Any) -> str:
    """Sha256, in hex, of a value as JSON, whatever the order of its fields."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


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


def artifact_id(recipe: str, stage: str, fingerprint: str) -> str:
    """An artifact's name and its place in a store."""
    return f"{recipe}/{stage}-{fingerprint[:8]}"


@dataclass(frozen=True)
class ArtifactWriter:
    """An artifact being written. Nothing of it exists for readers until ``commit``."""

    uri: str
    recipe: str
    stage: str
    fingerprint: str
    config: Any
    parents: Mapping[str, str]

    @property
    def id(self) -> str:
        return artifact_id(self.recipe, self.stage, self.fingerprint)

    @property
    def workspace(self) -> str:
        """A folder or URI beside the drafts of this stage for what a killed attempt leaves to the next.

        It outlives attempts, edits of the recipe included, and goes with the first ``commit``.
        """
        head, mark, query = self.uri.partition("?")
        return f"{head.rpartition('/')[0]}/{self.stage}{WORK}{mark}{query}"

    @property
    def marks(self) -> str:
        """A folder or URI in the workspace. A file ``NAME.json`` there says that the draft's ``NAME`` is finished: it
        stays for the next attempt at this artifact.
        """
        return join_uri(self.workspace, self.fingerprint)

    def clear(self) -> bool:
        """Delete what was written, but for what is marked as finished; whether anything is left.

        Raises:
            OSError: something cannot be deleted.
        """
        files, path = filesystem(self.uri)
        marks = files.get_file_info(fs.FileSelector(filesystem(self.marks)[1], allow_not_found=True))
        finished = {info.base_name.removesuffix(".json") for info in marks}
        found = files.get_file_info(fs.FileSelector(path, allow_not_found=True)) if finished else []
        kept = {info.base_name for info in found} & finished
        if not kept:
            files.delete_dir_contents(path, missing_dir_ok=True)
        for info in found if kept else ():
            if info.type == fs.FileType.Directory:
                files.delete_dir(info.path)
            elif info.base_name not in kept:
                files.delete_file(info.path)
        return bool(kept)

    @contextmanager
    def directory(self) -> Iterator[Path]:
        """A local folder to write into; where the store is remote it is uploaded on leaving."""
        files, path = filesystem(self.uri)
        if isinstance(files, fs.LocalFileSystem):
            yield Path(path)
            return
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)
            fs.copy_files(scratch, path, destination_filesystem=files)

    def discard(self) -> None:
        """Delete what was written, as ``clear`` does: the stage failed."""
        if not self.clear():
            files, path = filesystem(self.uri)
            files.delete_dir(path)

    def commit(self, metrics: Mapping[str, Any], seconds: float) -> Artifact:
        """Hash every file and write the record, last and atomically."""
        files, root = filesystem(self.uri)
        if isinstance(files, fs.LocalFileSystem):
            flush_tree_to_disk(Path(root))  # or, after a power cut, a record might stand beside empty files
        record = Record(
            recipe=self.recipe,
            stage=self.stage,
            fingerprint=self.fingerprint,
            config=self.config,
            parents=dict(self.parents),
            files=file_entries(files, root),
            metrics=dict(metrics),
            seconds=round(seconds, 3),
            created=datetime.now(UTC).isoformat(timespec="microseconds"),
            versions={tool: version(tool) for tool in TOOLS},
        )
        atomic_write(files, f"{root}/{RECORD}", record.model_dump_json(indent=1).encode())
        self.clear_workspace()
        return Artifact(self.uri, record)

    def clear_workspace(self) -> None:
        """Nothing in the workspace is of use any more, nor what it marks in drafts of other fingerprints."""
        files, path = filesystem(self.workspace)
        for info in files.get_file_info(fs.FileSelector(path, allow_not_found=True)):
            draft = path.removesuffix(WORK) + f"-{info.base_name[:8]}"
            if len(info.base_name) == len(self.fingerprint) and info.base_name != self.fingerprint:
                names = {found.base_name for found in files.get_file_info(fs.FileSelector(draft, allow_not_found=True))}
                if names and RECORD not in names:
                    files.delete_dir(draft)
        if files.get_file_info(path).type == fs.FileType.Directory:
            files.delete_dir(path)


@dataclass(frozen=True)
class Store:
    """A folder or URI full of artifacts."""

    uri: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "uri", absolute_uri(self.uri))  # workers have other working directories

    @cached_property
    def _opened(self) -> tuple[fs.FileSystem, str]:
        return filesystem(self.uri)

    @property
    def local(self) -> bool:
        """Whether it is a folder, which can be held by ``lock``."""
        return isinstance(self._opened[0], fs.LocalFileSystem)

    @property
    def path(self) -> str:
        """On its file system."""
        return self._opened[1]

    def unfinished(self) -> set[str]:
        """Recipes of which a stage left something to go on from."""
        files, root = self._opened
        found = files.get_file_info(fs.FileSelector(root, recursive=True, allow_not_found=True))
        places = (info.path.removeprefix(root).strip("/").split("/") for info in found)
        return {place[0] for place in places if len(place) > 1 and place[1].endswith(WORK)}

    def _uri(self, recipe: str, stage: str, fingerprint: str) -> str:
        return join_uri(self.uri, artifact_id(recipe, stage, fingerprint))

    def lookup(self, recipe: str, stage: str, fingerprint: str) -> Artifact | None:
        """The finished artifact with this fingerprint, or None; a warning where its record cannot be read.

        Raises:
            StoreUnavailable: an object store cannot say.
        """
        uri = self._uri(recipe, stage, fingerprint)
        try:
            record = read_record(uri)
        except StoreUnavailable:  # to make it anew would delete what may be there
            raise
        except InputError as error:
            logger.warning("%s", error)
            return None
        return Artifact(uri, record) if record and record.fingerprint == fingerprint else None

    def new_writer(
        self, recipe: str, stage: str, fingerprint: str, config: Any, parents: Mapping[str, str]
    ) -> ArtifactWriter:
        """A directory for a new artifact; what an unfinished attempt left there is deleted, but for what it marked."""
        uri = self._uri(recipe, stage, fingerprint)
        files, path = filesystem(uri)
        writer = ArtifactWriter(uri, recipe, stage, fingerprint, config, parents)
        try:
            files.create_dir(path, recursive=True)
            writer.clear()
        except OSError as error:
            raise InputError(f"{uri}: cannot be written: {error}; expected a store you may write to") from None
        return writer

    def require(self) -> Self:
        """This store, where there is one.

        Raises:
            InputError: there is none.
        """
        files, path = self._opened
        if files.get_file_info(path).type != fs.FileType.Directory:
            raise InputError(f"{self.uri}: there is no store; expected the folder or URI that runs wrote to: --store")
        return self

    def delete(self, artifact: Artifact) -> None:
        """Delete an artifact: its record first, so that there is never half of one.

        Raises:
            InputError: it may not be deleted.
        """
        files, path = filesystem(artifact.uri)
        try:
            files.delete_file(f"{path}/{RECORD}")
            files.delete_dir(path)
        except OSError as error:
            raise InputError(f"{artifact.uri}: cannot be deleted: {error}") from None

    def artifacts(self) -> list[Artifact]:
        """Every finished artifact, oldest first; a warning for each whose record cannot be read."""
        readable, unreadable = self.read_all()
        for error in unreadable.values():
            logger.warning("%s", error)
        return readable

    def get(self, name: str) -> Artifact:
        """The artifact with this id (``stdlib-lm/train-1a2b3c4d``), the newest of a recipe's stage
        (``stdlib-lm/train``), or the one whose id has this in it.

        Raises:
            InputError: there is no such store; none or several match; or the record of the one that matches cannot be
                read.
        """
        self.require()
        readable, unreadable = self.read_all()
        matches = [a for a in readable if a.id == name]
        matches = matches or [a for a in readable if name == f"{a.record.recipe}/{a.record.stage}"][-1:]
        matches = matches or [a for a in readable if name in a.id]
        refused = [error for id, error in unreadable.items() if name in id]
        if refused and not matches:
            raise refused[0]
        for error in unreadable.values():
            logger.warning("%s", error)
        if len(matches) != 1:
            found = ", ".join(a.id for a in matches) or "none"
            names = {n for a in readable for n in (a.id, a.id.rpartition("-")[0], a.record.recipe, a.record.stage)}
            near = "" if matches else suggest_name(name, sorted(names))
            raise InputError(f"{name}: found {found} in {self.uri}{near}; expected one artifact, see `overproof ls`")
        return matches[0]

    def read_all(self) -> tuple[list[Artifact], dict[str, InputError]]:
        """The artifacts, oldest first; and of those whose record cannot be read, by their place, why.

        Folders whose names begin with a dot are of what is under way.
        """
        files, root = self._opened
        selector = fs.FileSelector(root, recursive=True, allow_not_found=True)
        readable, unreadable = [], {}
        for path in sorted(i.path for i in files.get_file_info(selector) if i.path.endswith(f"/{RECORD}")):
            place = path.removeprefix(root).removesuffix(f"/{RECORD}").lstrip("/")
            if any(part.startswith(".") for part in place.split("/")):
                continue
            uri = join_uri(self.uri, place)
            try:
                record = read_record(uri)
            except InputError as error:
                unreadable[place] = error
                continue
            if record:
                readable.append(Artifact(uri, record))
        return sorted(readable, key=lambda a: (a.record.created, a.id)), unreadable

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the store for one run. The kernel lets go when the process ends, however it ends.

        Object stores have no such lock: there, a cluster lets its jobs take turns (``pipeline.run_stage``).

        Raises:
            InputError: the store cannot be written, or another run holds it.
        """
        if not self.local:
            yield
            return
        path = Path(self._opened[1]) / ".lock"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = path.open("a+")
        except OSError as error:
            raise InputError(
                f"{self.uri}: cannot be written: {error.strerror}; give a store you may write to: --set store=FOLDER"
            ) from None
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                handle.seek(0)
                raise InputError(
                    f"{self.uri}: in use by {handle.read().strip() or 'another run'}; "
                    "wait for it to end, or give another store: --set store=FOLDER"
                ) from None
            handle.truncate(0)
            handle.write(f"process {os.getpid()} since {datetime.now(UTC):%H:%M:%S} UTC")
            handle.flush()
            yield
