"""An artifact being written: files are hashed by whoever writes them, and the commit reads none of them again."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pyarrow import fs

from overproof.artifacts.artifact import Artifact
from overproof.artifacts.record import RECORD, TOOLS, Record, artifact_id
from overproof.errors import InputError
from overproof.files import (
    CHUNK_BYTES,
    FileEntry,
    atomic_write,
    file_sizes,
    filesystem,
    flush_tree_to_disk,
    hash_files,
    hashed_file,
    join_uri,
    write_file,
)

WORK = ".work"  # ends the name of a folder in which a stage has what it goes on from
UPLOADS = 8  # at a time


@dataclass(frozen=True)
class ArtifactWriter:
    """An artifact being written. Nothing of it exists for readers until ``commit``.

    Each process has its own: what it has written stands in ``handed_in``, and a worker gives that back to the process
    that started it, to be handed in there.
    """

    uri: str
    recipe: str
    stage: str
    fingerprint: str
    config: Any
    parents: Mapping[str, str]
    handed_in: dict[str, FileEntry] = field(default_factory=dict, init=False, compare=False, repr=False)  # by name

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"handed_in": {}}

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

    def write(self, name: str, content: bytes) -> None:
        """Write a file of these bytes, and hand it in."""
        self.hand_in({name: write_file(self.uri, name, content)})

    def hand_in(self, files: Mapping[str, FileEntry]) -> None:
        """Take files that are written, as whoever wrote them hashed them; again where they are written again."""
        self.handed_in.update(files)

    @contextmanager
    def directory(self, name: str = "") -> Iterator[Path]:
        """A local folder to write into: the artifact's, or one in it. On leaving, the files that are new in it or
        changed are hashed and handed in; where the store is remote they are uploaded on the way.
        """
        files, path = filesystem(join_uri(self.uri, name) if name else self.uri)
        if isinstance(files, fs.LocalFileSystem):
            folder = Path(path)
            folder.mkdir(parents=True, exist_ok=True)
            before = _stamps(folder)
            yield folder
            changed = [found for found, stamp in _stamps(folder).items() if before.get(found) != stamp]
            entries = hash_files(files, path, changed)
        else:
            with tempfile.TemporaryDirectory() as scratch:
                yield Path(scratch)
                entries = _upload(Path(scratch), files, path)
        self.hand_in({f"{name}/{found}" if name else found: entry for found, entry in entries.items()})

    def discard(self) -> None:
        """Delete what was written, as ``clear`` does: the stage failed."""
        if not self.clear():
            files, path = filesystem(self.uri)
            files.delete_dir(path)

    def commit(self, metrics: Mapping[str, Any], seconds: float) -> Artifact:
        """Write the record, last and atomically: of the files that were handed in, by the hashes that came with them,
        where one listing finds each with its size and no others. Where nothing was handed in, the files that are there
        are read and hashed here.

        Raises:
            InputError: a file is missing, has another size, or was not handed in; nothing is recorded.
        """
        files, root = filesystem(self.uri)
        if isinstance(files, fs.LocalFileSystem):
            flush_tree_to_disk(Path(root))  # or, after a power cut, a record might stand beside empty files
        sizes = file_sizes(files, root)
        entries = self.handed_in or hash_files(files, root, sizes)
        self._require_as_written(entries, sizes)
        record = Record(
            recipe=self.recipe,
            stage=self.stage,
            fingerprint=self.fingerprint,
            config=self.config,
            parents=dict(self.parents),
            files=dict(sorted(entries.items())),
            metrics=dict(metrics),
            seconds=round(seconds, 3),
            created=datetime.now(UTC).isoformat(timespec="microseconds"),
            versions={tool: version(tool) for tool in TOOLS},
        )
        atomic_write(files, f"{root}/{RECORD}", record.model_dump_json(indent=1).encode())
        self.clear_workspace()
        return Artifact(self.uri, record)

    def _require_as_written(self, entries: Mapping[str, FileEntry], sizes: Mapping[str, int]) -> None:
        for name in sorted({*entries, *sizes}):
            entry, size_bytes = entries.get(name), sizes.get(name)
            if entry is None:
                fault = f"found {size_bytes:,} bytes; expected no such file, for nobody who wrote the artifact named it"
            elif size_bytes is None:
                fault = f"found no such file; expected the {entry.size_bytes:,} bytes that were written"
            elif size_bytes != entry.size_bytes:
                fault = f"found {size_bytes:,} bytes; expected the {entry.size_bytes:,} that were written"
            else:
                continue
            raise InputError(
                f"{self.uri}: {name}: {fault}: the write was cut, or another process changed the folder since; nothing "
                "was recorded: run again"
            )

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


def _stamps(folder: Path) -> dict[str, tuple[int, int, int]]:
    """What tells whether a file was written to, of each below a folder, by name."""
    found = {path.relative_to(folder).as_posix(): path.stat() for path in folder.rglob("*") if path.is_file()}
    return {name: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in found.items()}


def _upload(folder: Path, files: fs.FileSystem, root: str) -> dict[str, FileEntry]:
    """Copy every file below a local folder, several at a time; what each is, by name."""

    def copy(name: str) -> FileEntry:
        with (folder / name).open("rb") as source, hashed_file(files, f"{root}/{name}") as target:
            shutil.copyfileobj(source, target, CHUNK_BYTES)
        return target.entry()

    names = sorted(_stamps(folder))
    with ThreadPoolExecutor(UPLOADS) as pool:
        return dict(zip(names, pool.map(copy, names), strict=True))
