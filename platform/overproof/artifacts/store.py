"""A store: a local folder, or any URI that ``pyarrow.fs`` opens, full of artifacts."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from pyarrow import fs

from overproof.artifacts.artifact import Artifact
from overproof.artifacts.record import RECORD, StoreUnavailable, artifact_id, read_record
from overproof.artifacts.writer import WORK, ArtifactWriter
from overproof.errors import InputError, suggest_name
from overproof.files import absolute_uri, filesystem, join_uri

logger = logging.getLogger(__name__)


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
