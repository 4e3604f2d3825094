"""Whether the store can be written, read and emptied again from here."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyarrow import fs

from overproof.errors import InputError
from overproof.files import filesystem, join_uri, read_bytes

PROBE_PREFIX = ".overproof-probe-"


@contextmanager
def probe_store(uri: str) -> Iterator[tuple[str, str]]:
    """Write a small file below a store and read it again; yields its URI and text, and leaves nothing behind.

    Raises:
        InputError: the store cannot be written, read or emptied, or gives back something else.
    """
    text = secrets.token_hex(16)
    files, root = filesystem(uri)
    name = f"{PROBE_PREFIX}{text[:8]}"
    path = f"{root.rstrip('/')}/{name}"
    local = isinstance(files, fs.LocalFileSystem)
    try:
        missing = _missing_folders(files, root, local)
    except OSError as error:
        raise _unwritable(uri, error) from None  # a store that is out of reach holds nothing to clean up
    try:
        try:
            found = _write_and_read(files, root if local else None, path, text)
        except OSError as error:
            raise _unwritable(uri, error) from None
        if found != text:
            raise InputError(f"{uri}: {text!r} was written and {found!r} read back; expected a sound store")
        yield join_uri(uri, name), text
    finally:
        _remove_probe(files, path, missing, local)


def _unwritable(uri: str, error: OSError) -> InputError:
    return InputError(f"{uri}: cannot be written: {error}; give a store you may write to: --set store=FOLDER or URI")


def _write_and_read(files: fs.FileSystem, folder: str | None, path: str, text: str) -> str:
    if folder:
        files.create_dir(folder, recursive=True)
    with files.open_output_stream(path) as stream:
        stream.write(text.encode())
    return read_bytes(files, path).decode(errors="replace")


def _missing_folders(files: fs.FileSystem, root: str, local: bool) -> list[str]:
    """The folders of a path that are not there yet, deepest first; never a bucket."""
    missing = []
    while root.strip("/") and (local or "/" in root.strip("/")):
        if files.get_file_info(root).type != fs.FileType.NotFound:
            break
        missing.append(root)
        root = root.rsplit("/", 1)[0]
    return missing


def _remove_probe(files: fs.FileSystem, path: str, missing: list[str], local: bool) -> None:
    try:
        if files.get_file_info(path).type == fs.FileType.File:
            files.delete_file(path)
        for folder in missing:  # made by the probe, unless another run began meanwhile
            if local:
                Path(folder).rmdir()
            elif files.get_file_info(fs.FileSelector(folder, allow_not_found=True)):
                return
            elif files.get_file_info(folder).type == fs.FileType.Directory:
                files.delete_dir(folder)
    except OSError:
        return  # another run writes there already, or what failed above fails again
