"""The Hugging Face directory a model starts from, local or behind a URI."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pyarrow import fs

from overproof import hub
from overproof.config import Pretrained
from overproof.data.heartbeat import Heartbeat
from overproof.data.manifest import TOKENIZER
from overproof.data.sources import CONVERTIBLE, NAMING_TOKENS
from overproof.errors import InputError
from overproof.files import FileEntry, absolute_uri, filesystem, local_cache, read_bytes
from overproof.stage_context import Progress, no_progress

WEIGHTS = "model.safetensors"
SHARDS = f"{WEIGHTS}.index.json"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
# What is read of a repository on the Hub beside its weights: never a pickle, never code.
READ = (*NAMING_TOKENS, *CONVERTIBLE, TOKENIZER, SHARDS, "added_tokens.json", "vocab.txt", "chat_template.jinja")


def directory_identity(path: str) -> Any:
    """What an artifact that follows from a directory goes by: of a model on the Hub its commit, otherwise its files.

    Raises:
        InputError: as ``list_directory``, or the Hub has no such model.
    """
    if hub.is_model(path):
        found = hub.repository(path)
        return {"repository": found.name, "commit": found.commit}
    return list_directory(path)


def list_directory(path: str) -> list[tuple[str, int, int]]:
    """Name, size in bytes and time of change (ns) of each file; of a model on the Hub the files that are read.

    Raises:
        InputError: there is no such folder, it is empty, or a pickle lies there; or the Hub has no such model.
    """
    if hub.is_model(path):
        sizes = hub.repository(path).files
        return [(name, sizes[name], 0) for name in _read_of(path)]
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
            named = set(json.loads(read_bytes(files, f"{root}/{SHARDS}"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{root}/{SHARDS}: cannot be read: {error!r}; expected a weight_map") from None
        if named - there:
            raise InputError(f"{root}: {min(named - there)} is missing; expected the files that {SHARDS} names")
    if not named:
        raise InputError(f"{root}: no *.safetensors file; expected a Hugging Face model directory")
    return [f"{root}/{name}" for name in sorted(named)]


def weights_sha256(files: Mapping[str, FileEntry], folder: str) -> str:
    """What a directory within an artifact goes by, whatever its other files: the hash of its file of weights, or of
    the names and hashes of several.
    """
    found = {
        name: entry.sha256
        for name, entry in files.items()
        if name.startswith(f"{folder}/") and name.endswith(".safetensors")
    }
    one = found.get(f"{folder}/{WEIGHTS}")
    return one or hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def absolute_pretrained(model: Pretrained) -> Pretrained:
    """The same directory, named so that processes with other working directories find it."""
    return Pretrained(path=absolute_uri(model.path))


def _read_of(path: str) -> list[str]:
    """The files of a repository on the Hub that are read.

    Raises:
        InputError: it has no configuration, or no weights but pickles.
    """
    sizes = hub.repository(path).files
    if not any(name.endswith(".safetensors") for name in sizes):
        refuse_pickles(path, (name for name in sizes if "/" not in name))
    files, root = filesystem(path)
    weights = [Path(name).name for name in weight_files(files, root)]
    return sorted({name for name in READ if name in sizes} | set(weights))


def _linked(snapshot: Path, names: Sequence[str]) -> Path:
    """A folder of these files of the Hub's cache alone: other tools may have fetched pickles and code beside them."""

    def link(folder: Path) -> None:
        for name in names:
            (folder / name).symlink_to(snapshot / name)

    return local_cache(hashlib.sha256(json.dumps([str(snapshot), *names]).encode()).hexdigest(), link)


def fetch_pretrained(path: str, progress: Progress = no_progress) -> Path:
    """The directory on this machine; from a URI it is fetched once.

    Raises:
        InputError: as ``list_directory``.
    """
    if hub.is_model(path):
        names = _read_of(path)
        if (there := hub.cached(path, names)) is not None:
            return _linked(there, names)
        with Heartbeat(progress, "fetch", 1) as beat:
            beat.start_phase(0, path)
            fetched = hub.download(path, names, lambda far: beat.start_phase(0, lambda: f"{path}: {far()}"))
            beat.start_phase(1, "")
        return _linked(fetched, names)
    files, root = filesystem(path)
    if isinstance(files, fs.LocalFileSystem):
        return Path(root)
    key = hashlib.sha256(json.dumps([path, list_directory(path)]).encode()).hexdigest()
    return local_cache(key, lambda folder: fs.copy_files(root, str(folder), source_filesystem=files))
