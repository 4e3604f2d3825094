"""Whether the store can be written, read and emptied again from here, and seen from every node of a cluster."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyarrow import fs

from overproof.errors import InputError
from overproof.files import filesystem, join_uri

PROBE = ".overproof-probe-"
LOOK_TIMEOUT_S = 60


@contextmanager
def probe_store(uri: str) -> Iterator[tuple[str, str]]:
    """Write a small file below a store and read it again; yields its URI and text, and leaves nothing behind.

    Raises:
        InputError: the store cannot be written, read or emptied, or gives back something else.
    """
    text = secrets.token_hex(16)
    files, root = filesystem(uri)
    name = f"{PROBE}{text[:8]}"
    path = f"{root.rstrip('/')}/{name}"
    local = isinstance(files, fs.LocalFileSystem)
    try:
        missing = _missing(files, root, local)
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
        _clean(files, path, missing, local)


def _unwritable(uri: str, error: OSError) -> InputError:
    return InputError(f"{uri}: cannot be written: {error}; give a store you may write to: --set store=FOLDER or URI")


def _write_and_read(files: fs.FileSystem, folder: str | None, path: str, text: str) -> str:
    if folder:
        files.create_dir(folder, recursive=True)
    with files.open_output_stream(path) as stream:
        stream.write(text.encode())
    with files.open_input_stream(path) as stream:
        return str(stream.read().decode(errors="replace"))


def _missing(files: fs.FileSystem, root: str, local: bool) -> list[str]:
    """The folders of a path that are not there yet, deepest first; never a bucket."""
    found = []
    while root.strip("/") and (local or "/" in root.strip("/")):
        if files.get_file_info(root).type != fs.FileType.NotFound:
            break
        found.append(root)
        root = root.rsplit("/", 1)[0]
    return found


def _clean(files: fs.FileSystem, path: str, missing: list[str], local: bool) -> None:
    try:
        if files.get_file_info(path).type == fs.FileType.File:
            files.delete_file(path)
        for folder in missing:  # which only the probe brought about, unless another run began meanwhile
            if local:
                Path(folder).rmdir()
            elif files.get_file_info(fs.FileSelector(folder, allow_not_found=True)):
                return
            elif files.get_file_info(folder).type == fs.FileType.Directory:
                files.delete_dir(folder)
    except OSError:
        return  # another run writes there already, or what failed above fails again


def nodes_without(path: str, text: str) -> list[str]:
    """Addresses of the connected cluster's nodes on which a local file is not there with this text."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=1)(_sees)
    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    looks = [
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(path, text)
        for node in nodes
    ]
    found = ray.get(looks, timeout=LOOK_TIMEOUT_S)
    return [node["NodeManagerAddress"] for node, seen in zip(nodes, found, strict=True) if not seen]


def _sees(path: str, text: str) -> bool:
    try:
        return Path(path).read_text(encoding="utf-8") == text
    except (OSError, UnicodeDecodeError):
        return False
