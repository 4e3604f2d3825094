"""Artifacts: what a stage leaves behind, with its identity, its record and its parents.

An artifact is the directory ``<store>/<recipe name>/<stage>-<8 hex of the fingerprint>/``. Its record,
``artifact.json``, is written last and at once: a directory without a record does not exist. A store is a
local folder or any URI that ``pyarrow.fs`` opens.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pyarrow import fs
from pydantic import BaseModel, ConfigDict

from overproof.errors import InputError
from overproof.files import (
    FileEntry,
    absolute_uri,
    atomic_write,
    file_entries,
    filesystem,
    join_uri,
    local_cache,
    verify_files,
)

RECORD = "artifact.json"
TOOLS = ("overproof", "ray", "deepspeed", "torch", "transformers", "pyarrow", "gguf", "xllamacpp", "onnxruntime")


class Record(BaseModel):
    """The content of ``artifact.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    format: int = 1
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


def compute_fingerprint(stage: str, format: int, config: Any, parents: Mapping[str, str]) -> str:
    """Sha256 over the stage, its format version, its part of the recipe and its parents' fingerprints."""
    value = {"stage": stage, "format": format, "config": config, "parents": dict(parents)}
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
    def content_sha256(self) -> str:
        """A hash of every file's name and hash."""
        listed = {path: entry.sha256 for path, entry in self.record.files.items()}
        return hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()

    def local(self) -> Path:
        """The artifact's directory on this machine, fetched once where the store is remote."""
        files, path = filesystem(self.uri)
        if isinstance(files, fs.LocalFileSystem):
            return Path(path)
        key = hashlib.sha256(self.record.model_dump_json().encode()).hexdigest()  # built again, it is another artifact

        def fetch(folder: Path) -> None:
            fs.copy_files(path, str(folder), source_filesystem=files)
            verify_files(str(folder), self.record.files)

        return local_cache(key, fetch)

    def verify(self) -> None:
        """Hash every file again.

        Raises:
            InputError: a file is missing or differs from the record.
        """
        verify_files(self.uri, self.record.files)


def artifact_id(recipe: str, stage: str, print_: str) -> str:
    """An artifact's name and its place in a store."""
    return f"{recipe}/{stage}-{print_[:8]}"


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
        return f"{head.rpartition('/')[0]}/{self.stage}.work{mark}{query}"

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
        """Delete what was written: the stage failed."""
        files, path = filesystem(self.uri)
        files.delete_dir(path)

    def commit(self, metrics: Mapping[str, Any], seconds: float) -> Artifact:
        """Hash every file and write the record, last and at once."""
        files, root = filesystem(self.uri)
        record = Record(
            recipe=self.recipe,
            stage=self.stage,
            fingerprint=self.fingerprint,
            config=self.config,
            parents=dict(self.parents),
            files=file_entries(files, root),
            metrics=dict(metrics),
            seconds=round(seconds, 3),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            versions={tool: version(tool) for tool in TOOLS},
        )
        atomic_write(files, f"{root}/{RECORD}", record.model_dump_json(indent=1).encode())
        self.clear_workspace()
        return Artifact(self.uri, record)

    def clear_workspace(self) -> None:
        """Nothing in the workspace is of use any more."""
        files, path = filesystem(self.workspace)
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

    def _uri(self, recipe: str, stage: str, print_: str) -> str:
        return join_uri(self.uri, artifact_id(recipe, stage, print_))

    def find(self, recipe: str, stage: str, print_: str) -> Artifact | None:
        """The finished artifact with this fingerprint, or None."""
        artifact = self._read(self._uri(recipe, stage, print_))
        return artifact if artifact and artifact.record.fingerprint == print_ else None

    def begin(self, recipe: str, stage: str, print_: str, config: Any, parents: Mapping[str, str]) -> ArtifactWriter:
        """An empty directory for a new artifact; what an unfinished attempt left there is deleted."""
        uri = self._uri(recipe, stage, print_)
        files, path = filesystem(uri)
        try:
            files.create_dir(path, recursive=True)
            files.delete_dir_contents(path, missing_dir_ok=True)
        except OSError as error:
            raise InputError(f"{uri}: cannot be written: {error}; expected a store you may write to") from None
        return ArtifactWriter(uri, recipe, stage, print_, config, parents)

    def artifacts(self) -> list[Artifact]:
        """Every finished artifact, oldest first."""
        files, root = self._opened
        selector = fs.FileSelector(root, recursive=True, allow_not_found=True)
        records = [i.path for i in files.get_file_info(selector) if i.path.endswith(f"/{RECORD}")]
        found = (
            self._read(join_uri(self.uri, path.removeprefix(root).removesuffix(f"/{RECORD}").lstrip("/")))
            for path in records
        )
        return sorted((a for a in found if a), key=lambda a: (a.record.created, a.id))

    def get(self, name: str) -> Artifact:
        """The artifact with this id (``stdlib-lm/train-1a2b3c4d``), or part of one that only one has.

        Raises:
            InputError: none or several match.
        """
        matches = [a for a in self.artifacts() if a.id == name] or [a for a in self.artifacts() if name in a.id]
        if len(matches) != 1:
            found = ", ".join(a.id for a in matches) or "none"
            raise InputError(f"{name}: found {found} in {self.uri}; expected one artifact, see `overproof ls`")
        return matches[0]

    def _read(self, uri: str) -> Artifact | None:
        files, path = filesystem(uri)
        if files.get_file_info(f"{path}/{RECORD}").type != fs.FileType.File:
            return None
        with files.open_input_stream(f"{path}/{RECORD}") as stream:
            return Artifact(uri, Record.model_validate_json(stream.read()))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the store for one run. The kernel lets go when the process ends, however it ends.

        Object stores have no such lock: there, a cluster lets its jobs take turns (``pipeline.run_step``).

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
