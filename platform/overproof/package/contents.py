"""What a package's folder holds, and that it is nothing but what ``package.json`` lists.

Names are looked at without following links, and a file is opened once: what was hashed is what was read.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

from pyarrow import fs
from pydantic import Field

from overproof.artifacts import RECORD, artifact_id, json_sha256, read_record
from overproof.config import Gate, Speculate
from overproof.errors import InputError
from overproof.evaluate.gate import VERDICT
from overproof.evaluate.metrics import REPORT
from overproof.files import CHUNK_BYTES, FileEntry, FrozenModel, filesystem, hash_files, parse_json, retried
from overproof.models import pretrained

PACKAGE, CARD = "package.json", "README.md"
SPECULATION, SIGNATURE = "speculation.json", "package.sig"
UNLISTED = (PACKAGE, SIGNATURE)  # of a package all the same; the record that a store keeps beside them is not read
PICKLES = (*pretrained.PICKLES, ".joblib", ".npy", ".npz")
MAX_JSON_BYTES = 16 << 20
FILE_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"  # never a path
FileName = Annotated[str, Field(pattern=FILE_NAME)]
SHA256 = r"^[0-9a-f]{64}$"  # private copies are named by it: never a path either


class DraftModel(FrozenModel):
    """What a package has beside another when its model answers with a draft."""

    draft: str  # the export that passed the gate
    file: FileName = "draft.gguf"
    policy: Speculate


class PackageContents(FrozenModel):
    """The content of ``package.json``."""

    format: Literal[4] = 4
    id: str  # of the artifact, as `overproof show` takes it
    name: str
    task: str
    details: dict[str, Any]  # what the task says of a row: what a request must hold, and what answers mean
    candidate: str  # the export that was chosen
    model: FileName
    model_format: str
    companions: tuple[FileName, ...] = ()  # files that the engine reads beside the model
    policy: Gate
    speculate: DraftModel | None = None
    files: dict[FileName, FileEntry]
    parents: dict[str, str]  # stage -> fingerprint
    shards: dict[str, str]  # path in the prepared data -> sha256
    created: str  # UTC, ISO 8601
    versions: dict[str, str]


@dataclass(frozen=True)
class Listing:
    """A package's ``package.json`` and signature as they were read, once."""

    content: PackageContents
    files: Mapping[str, FileEntry]  # every file of the package, package.json and the signature too
    small: Mapping[str, bytes]  # the bytes of those two

    @property
    def sha256(self) -> str:
        """The identity of all that the package holds."""
        return json_sha256({name: entry.sha256 for name, entry in self.files.items()})

    @property
    def signature(self) -> bytes | None:
        return self.small.get(SIGNATURE)

    @property
    def policy_sha256(self) -> str:
        """The identity of the policy by which the served file passed, with that of its draft if it has one."""
        tree = json.loads(self.small[PACKAGE])
        drafting = tree.get("speculate")
        return json_sha256({"gate": tree["policy"]} | ({"speculate": drafting["policy"]} if drafting else {}))


class PackageFolder:
    """The folder or URI of a package.

    Raises:
        InputError: wherever something lies there that is no plain file, or that cannot be read.
    """

    def __init__(self, where: str | Path) -> None:
        self._files, self._root = filesystem(str(where))
        self.local = isinstance(self._files, fs.LocalFileSystem)

    def __str__(self) -> str:
        return self._root

    @property
    def remedy(self) -> str:
        """What to do where it does not hold together: whose copy it is decides who can make it again."""
        try:
            record = read_record(self._root) if self.local else None
        except InputError:
            record = None
        recipe, gate = Path(self._root).parent, record and record.parents.get("gate")
        if gate and (recipe / Path(artifact_id("", "gate", gate)).name / RECORD).is_file():
            own = f"{recipe.name}/{Path(self._root).name}"
            return f"it was made in this store: `overproof rm {own}`, and run the recipe {recipe.name} again"
        return "this copy came from elsewhere: have it given anew, or import it again, and delete this one"

    def sizes(self) -> dict[str, int]:
        """Sizes in bytes of the package's files by name, but for the store's record."""
        if self._files.get_file_info(f"{self._root}/{PACKAGE}").type == fs.FileType.NotFound:
            raise InputError(
                f"{self._root}: no {PACKAGE}, so no package; expected one, as `overproof run` makes: RECIPE/package"
            )
        found = dict(self._local_entries() if self.local else self._remote_entries())
        if PACKAGE not in found:
            raise InputError(f"{self._root}: no {PACKAGE}; expected a package, as `overproof run` makes")
        found.pop(RECORD, None)
        spelled: dict[str, str] = {}
        for name in sorted(found):
            if not re.fullmatch(FILE_NAME, name):
                raise InputError(f"{self._root}/{name}: no name of a package's file, which has no folders; delete it")
            if (other := spelled.setdefault(name.lower(), name)) != name:
                raise InputError(f"{self._root}/{name}: differs from {other} in case alone; {self.remedy}")
        return found

    @contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """One file, which is no link."""
        with self._readable(name), self._open(name) as stream:
            yield stream

    @contextmanager
    def _open(self, name: str) -> Iterator[BinaryIO]:
        path = f"{self._root}/{name}"
        if self.local:
            with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb", 0) as stream:
                if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                    raise InputError(f"{path}: no plain file; a package holds nothing else: delete it")
                yield stream
        else:
            with self._files.open_input_stream(path, buffer_size=CHUNK_BYTES) as stream:
                yield stream

    @contextmanager
    def _readable(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(f"{self._root}/{name}: cannot be read: {error.strerror or error}; {self.remedy}") from None

    def read(self, name: str) -> bytes:
        """A small file's bytes."""

        def attempt() -> bytes:
            with self._open(name) as stream:
                return b"".join(chunks(stream, MAX_JSON_BYTES + 1))

        with self._readable(name):
            content = retried(attempt, f"{self._root}/{name}")
        if len(content) > MAX_JSON_BYTES:
            raise InputError(f"{self._root}/{name}: more than {MAX_JSON_BYTES:,} bytes; {self.remedy}")
        return content

    def _local_entries(self) -> Iterator[tuple[str, int]]:
        try:
            with os.scandir(self._root) as entries:
                for entry in entries:
                    if entry.is_symlink():
                        raise InputError(f"{entry.path}: a link; a package holds its files themselves; {self.remedy}")
                    if not entry.is_file(follow_symlinks=False):
                        kind = "a folder" if entry.is_dir(follow_symlinks=False) else "no plain file"
                        raise InputError(f"{entry.path}: {kind}; a package holds plain files alone: delete it")
                    yield entry.name, entry.stat(follow_symlinks=False).st_size
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise InputError(f"{self._root}: cannot be read: {error.strerror}; expected a package") from None

    def _remote_entries(self) -> Iterator[tuple[str, int]]:
        for info in self._files.get_file_info(fs.FileSelector(self._root, recursive=True, allow_not_found=True)):
            if info.type != fs.FileType.File:
                raise InputError(f"{info.path}: a folder; a package holds plain files alone: delete it")
            yield info.path.removeprefix(self._root).lstrip("/"), info.size


def chunks(stream: BinaryIO, most_bytes: int | None = None) -> Iterator[bytes]:
    """A stream's bytes, up to so many."""
    while most_bytes is None or most_bytes > 0:
        chunk = stream.read(CHUNK_BYTES if most_bytes is None else min(CHUNK_BYTES, most_bytes))
        if not chunk:
            return
        yield chunk
        most_bytes = None if most_bytes is None else most_bytes - len(chunk)


def read_listing(folder: PackageFolder) -> Listing:
    """What a folder says that it holds; its names and sizes are as listed, and hashes are for the caller to compare.

    Raises:
        InputError: the listing cannot be read or lists a pickle, a needed part is not listed, or the folder lacks a
            listed file, holds another, or has one of another size.
    """
    sizes = folder.sizes()
    small = {name: folder.read(name) for name in UNLISTED if name in sizes}
    expected = f"expected what this version writes; {folder.remedy}"
    content = parse_json(PackageContents, small[PACKAGE], f"{folder}/{PACKAGE}", expected)
    drafted = () if content.speculate is None else (content.speculate.file, SPECULATION)
    for part in (content.model, REPORT, VERDICT, CARD, *content.companions, *drafted):
        if part not in content.files:
            raise InputError(f"{folder}/{PACKAGE}: lists no {part}; {folder.remedy}")
    for name, entry in content.files.items():
        if not re.fullmatch(SHA256, entry.sha256):
            raise InputError(f"{folder}/{PACKAGE}: files.{name}.sha256: no sha256 in hex; {folder.remedy}")
        if name in (*UNLISTED, RECORD):
            raise InputError(f"{folder}/{PACKAGE}: lists {name}, which cannot hold its own hash; {folder.remedy}")
        if Path(name).suffix.lower() in PICKLES:
            raise InputError(f"{folder}/{name}: may be a pickle, which runs code when read; a package holds none")
    own = {name: FileEntry.of(found) for name, found in small.items()}
    for name in sorted(content.files.keys() - sizes.keys()):
        raise InputError(f"{folder}/{name}: missing, though {PACKAGE} lists it; {folder.remedy}")
    for name in sorted(sizes.keys() - content.files.keys() - set(UNLISTED)):
        raise InputError(f"{folder}/{name}: not listed in {PACKAGE}; a package holds nothing else: delete it")
    for name, entry in content.files.items():
        if sizes[name] != entry.size_bytes:
            raise InputError(
                f"{folder}/{name}: has {sizes[name]:,} bytes, {PACKAGE} says {entry.size_bytes:,}; it was changed "
                f"after it was packed; {folder.remedy}"
            )
    return Listing(content, {**content.files, **own}, small)


def mismatch(folder: PackageFolder, name: str, found: str, entry: FileEntry) -> InputError:
    """The error of a file that has another hash than the listed one."""
    return InputError(
        f"{folder}/{name}: sha256 is {found[:12]}…, {PACKAGE} says {entry.sha256[:12]}…; it was changed after it was "
        f"packed; {folder.remedy}"
    )


def list_parts(folder: Path) -> dict[str, FileEntry]:
    """Every part of a package that is being made; they are read."""
    return hash_files(fs.LocalFileSystem(), str(folder), (file.name for file in folder.iterdir()))
