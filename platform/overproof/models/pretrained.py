"""The Hugging Face directory a model starts from, local or behind a URI."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from pyarrow import fs

from overproof.config import Pretrained
from overproof.errors import InputError
from overproof.files import absolute_uri, filesystem, local_cache

WEIGHTS = "model.safetensors"
SHARDS = f"{WEIGHTS}.index.json"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


def list_directory(path: str) -> list[tuple[str, int, int]]:
    """Name, size in bytes and time of change (ns) of each file: what an artifact's identity covers.

    Raises:
        InputError: there is no such folder, it is empty, or a pickle lies there.
    """
    files, root = filesystem(path)
    found = files.get_file_info(fs.FileSelector(root, recursive=True, allow_not_found=True))
    names = sorted(
        (info.path.removeprefix(root).lstrip("/"), info.size, info.mtime_ns or 0)
        for info in found
        if info.type == fs.FileType.File
    )
    if not names:
        raise InputError(f"{path}: no such folder; expected a Hugging Face model directory")
    refuse_pickles(path, (name for name, _, _ in names))
    return names


def refuse_pickles(path: object, names: Iterable[str]) -> None:
    """Raises InputError if one of a directory's files may be a pickle."""
    for name in sorted(names):
        if name.endswith(PICKLES):
            raise InputError(
                f"{path}: found {name}, a pickle, which runs code when read; expected safetensors alone: "
                "convert the weights and delete it"
            )


def weight_files(files: fs.FileSystem, root: str) -> list[str]:
    """The safetensors files that a directory's weights are in, as transformers reads them: the one file, the shards
    that an index names, or whatever there is. Some directories hold the same weights once more, under other names.

    Raises:
        InputError: there are none, one is missing, or the index cannot be read.
    """
    there = {Path(info.path).name for info in files.get_file_info(fs.FileSelector(root, allow_not_found=True))}
    named = {name for name in there if name.endswith(".safetensors")}
    if WEIGHTS in there:
        named = {WEIGHTS}
    elif SHARDS in there:
        try:
            with files.open_input_stream(f"{root}/{SHARDS}") as stream:
                named = set(json.loads(stream.read())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{root}/{SHARDS}: cannot be read: {error!r}; expected a weight_map") from None
        if named - there:
            raise InputError(f"{root}: {min(named - there)} is missing; expected the files that {SHARDS} names")
    if not named:
        raise InputError(f"{root}: no *.safetensors file; expected a Hugging Face model directory")
    return [f"{root}/{name}" for name in sorted(named)]


def absolute_pretrained(model: Pretrained) -> Pretrained:
    """The same directory, named so that processes with other working directories find it."""
    return Pretrained(path=absolute_uri(model.path))


def fetch_pretrained(path: str) -> Path:
    """The directory on this machine; from a URI it is fetched once."""
    files, root = filesystem(path)
    if isinstance(files, fs.LocalFileSystem):
        return Path(root)
    key = hashlib.sha256(json.dumps([path, list_directory(path)]).encode()).hexdigest()
    return local_cache(key, lambda folder: fs.copy_files(root, str(folder), source_filesystem=files))
