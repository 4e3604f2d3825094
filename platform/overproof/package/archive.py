"""A package as one file, to be handed on: a tar archive of its parts and the store's record, verified on both sides."""

from __future__ import annotations

import io
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from overproof.artifacts import RECORD, Artifact, Store, artifact_id, read_record
from overproof.errors import InputError
from overproof.package.contents import PACKAGE, PackageFolder
from overproof.package.package import Package, open_package, resolve_package

PACKAGE_ID = r"[a-z0-9][a-z0-9._-]{0,63}/(package|speculate)-[0-9a-f]{8}"
EXPECTED = "expected an archive of `overproof export`"


def write_archive(where: str, file: Path) -> Package:
    """Write a package, which is verified before, as one archive; ``file`` appears when it is complete.

    The same package gives the same bytes: members are in the order of their names, and have no times or owners.

    Raises:
        InputError: the package does not hold together or changes meanwhile, has no record, or ``file`` lies there
            already or cannot be written.
    """
    if file.exists():
        raise InputError(f"{file}: lies there already; delete it, or give another name")
    where = resolve_package(where)
    package, record, folder = open_package(where), read_record(where), PackageFolder(where)
    if record is None:
        raise InputError(f"{where}: has no {RECORD}; expected a package of a store")
    part = file.with_name(f"{file.name}.part")
    encoded = record.model_dump_json(indent=1).encode()
    try:
        with tarfile.open(part, "w", format=tarfile.PAX_FORMAT) as archive:
            _add(archive, RECORD, io.BytesIO(encoded), len(encoded))
            for name, size in sorted(folder.sizes().items()):
                with folder.open(name) as stream:
                    _add(archive, name, stream, size)
        with _unpacked(part, file.parent) as unpacked:  # what was written is what was verified
            if open_package(unpacked).listing.sha256 != package.listing.sha256:
                raise InputError(f"{where}: changed while it was read; export it again")
        part.replace(file)
    except OSError as error:
        raise InputError(f"{file}: cannot be written: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            part.unlink()
    return package


def read_archive(file: Path, store: Store) -> tuple[Artifact, Package]:
    """Put the package of an archive into a local store, verified.

    Raises:
        InputError: it is no such archive or does not hold together, another package lies at its place, or the store
            is remote or cannot be written.
    """
    if not store.local:
        raise InputError(f"{store.uri}: expected a folder; copy the package's folder from there to the bucket")
    root = Path(store.path)
    with _naming_faults(file), tarfile.open(file, "r:") as members:  # before the store is made for it
        for _ in members:
            pass
    with store.lock(), _unpacked(file, root) as unpacked:
        record = read_record(str(unpacked))
        if record is None or not (unpacked / PACKAGE).is_file():
            raise InputError(f"{file}: holds no {RECORD} and {PACKAGE}; {EXPECTED}")
        package = open_package(unpacked)
        named = artifact_id(record.recipe, record.stage, record.fingerprint)
        if named != package.content.id or not re.fullmatch(PACKAGE_ID, named):  # which is a path below the store
            raise InputError(f"{file}: the record is of {named}, and the package is {package.content.id}; {EXPECTED}")
        place = root / named
        if place.exists():
            if open_package(place).listing.sha256 != package.listing.sha256:
                raise InputError(f"{place}: another package lies there; `overproof rm {named}` first")
        else:
            try:
                place.parent.mkdir(exist_ok=True)
                unpacked.rename(place)
            except OSError as error:
                raise InputError(f"{place}: cannot be written: {error.strerror}") from None
        return Artifact(str(place), record), package


def _add(archive: tarfile.TarFile, name: str, stream: BinaryIO, size: int) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    archive.addfile(member, stream)


@contextmanager
def _unpacked(file: Path, beside: Path) -> Iterator[Path]:
    """The archive's members in a folder of their own, of which something may be taken.

    Raises:
        InputError: it cannot be read, or a member is no plain file by its name alone.
    """
    folder = Path(tempfile.mkdtemp(prefix=".import-", dir=beside))
    try:
        with _naming_faults(file), tarfile.open(file, "r:") as archive:
            for member in archive:
                stream = archive.extractfile(member) if member.type == tarfile.REGTYPE else None
                if stream is None or "/" in member.name or member.name in (".", "..", ""):
                    raise InputError(f"{file}: member {member.name!r} is no plain file of a package; {EXPECTED}")
                with (folder / member.name).open("xb") as copy:
                    shutil.copyfileobj(stream, copy)
        folder.chmod(0o755)
        yield folder
    except InputError as error:  # of the archive, wherever its members lie
        raise InputError(str(error).replace(f"{folder}/", f"{file}: ")) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _naming_faults(file: Path) -> Iterator[None]:
    try:
        yield
    except tarfile.TarError as error:
        raise InputError(f"{file}: cannot be read: {error}; {EXPECTED}") from None
    except OSError as error:
        raise InputError(f"{file}: {error.strerror or error}; {EXPECTED}") from None
