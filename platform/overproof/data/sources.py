"""The files a recipe's data comes from: which they are, and a digest that changes when any of them does.

Light on purpose: the command line lists sources before it loads Ray.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sysconfig
from functools import lru_cache
from pathlib import Path

from pyarrow import fs

from overproof.config import (
    FolderSource,
    JsonlSource,
    ParquetSource,
    StdlibSource,
    TextData,
    TokenizerFile,
)
from overproof.data.manifest import TOKENIZER
from overproof.data.source_files import (
    FileListing,
    OnError,
    SourceFile,
    list_source,
    list_suffix,
    matching,
)
from overproof.errors import InputError
from overproof.files import absolute_uri, filesystem, read_bytes

Source = StdlibSource | FolderSource | JsonlSource | ParquetSource

# What says which tokens begin and end a text, and what transformers makes a tokenizer.json of where there is none.
NAMING_TOKENS = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json")
CONVERTIBLE = ("tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "tekken.json")

# Tests are left out of the standard library: many installations do not ship them.
EXCLUDED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})


def text_digest(data: TextData) -> str:
    """Sha256, in hex, over what the data is made from: names, sizes and times, and the tokenizer file's content.

    Raises:
        InputError: the source or the tokenizer file is missing, or nothing matches.
    """
    identity: list[object] = list(list_text_files(data).identity)
    if isinstance(data.source, StdlibSource):
        identity.append(platform.python_version())
    if isinstance(data.tokenizer, TokenizerFile):
        found = sorted(tokenizer_files(data.tokenizer).items())
        identity.append([(name, hashlib.sha256(content).hexdigest()) for name, content in found])
    return sha256_of(identity)


def sha256_of(value: object) -> str:
    """Sha256, in hex, of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def tokenizer_files(tokenizer: TokenizerFile, where: str = "data.tokenizer.path: ") -> dict[str, bytes]:
    """``tokenizer.json`` and the files beside it that name its special tokens; or those that one can be made of.

    Raises:
        InputError: there are none; ``where`` begins its message.
    """
    files, path = filesystem(tokenizer.path)
    info = files.get_file_info(path)
    if info.type == fs.FileType.NotFound:
        raise InputError(
            f"{where}{tokenizer.path}: no such file or folder; expected a tokenizer.json, or the "
            "directory of a model that has one"
        )
    is_file = info.type == fs.FileType.File
    folder = path.rpartition("/")[0] if is_file else path.rstrip("/")
    wanted = {TOKENIZER: path if is_file else f"{folder}/{TOKENIZER}"}
    wanted |= {name: f"{folder}/{name}" for name in (*NAMING_TOKENS, *CONVERTIBLE)}
    infos = zip(wanted, files.get_file_info(list(wanted.values())), strict=True)
    there = [name for name, found in infos if found.type == fs.FileType.File]
    if TOKENIZER in there:
        there = [name for name in there if name not in CONVERTIBLE]
    elif not any(name in CONVERTIBLE for name in there):
        raise InputError(
            f"{where}{tokenizer.path}: no such file in it as {', '.join((TOKENIZER, *CONVERTIBLE))}; "
            "expected the directory of a model with its tokenizer"
        )
    return {name: read_bytes(files, wanted[name]) for name in there}


def absolute_source(source: Source) -> Source:
    """The same source with an absolute path: workers start in other folders."""
    if isinstance(source, StdlibSource):
        return source
    return source.model_copy(update={"path": absolute_uri(source.path)})


@lru_cache(maxsize=4)
def source_root(source: Source) -> tuple[fs.FileSystem, str]:
    """The file system and folder that a source's file names are relative to, on this machine."""
    if isinstance(source, StdlibSource):
        return fs.LocalFileSystem(), sysconfig.get_paths()["stdlib"]
    files, path = filesystem(source.path)
    is_file = not isinstance(source, FolderSource) and files.get_file_info(path).type == fs.FileType.File
    return files, path.rpartition("/")[0] if is_file else path.rstrip("/")


def list_text_files(data: TextData) -> FileListing:
    """The files that documents come from.

    Raises:
        InputError: the source is missing, or nothing matches.
    """
    return list_files(data.source, data.on_error)


def list_files(source: Source, on_error: OnError = "fail") -> FileListing:
    """The files of a source, by name.

    Raises:
        InputError: the folder is missing, or nothing matches.
    """
    if isinstance(source, StdlibSource):
        folder = sysconfig.get_paths()["stdlib"]
        return FileListing(folder, tuple(sorted(_stdlib(Path(folder)))))
    if not isinstance(source, FolderSource):
        return list_suffix(source.path, f".{source.kind}", on_error)
    files, path = filesystem(source.path)
    if files.get_file_info(path).type == fs.FileType.File:
        raise InputError(f"data.source.path: {source.path} is a file; expected a folder")
    return list_source(source.path, matching(*source.patterns), " or ".join(source.patterns), on_error)


def _stdlib(folder: Path, prefix: str = "") -> list[SourceFile]:
    listed: list[SourceFile] = []
    for entry in folder.iterdir():
        if entry.is_dir() and entry.name not in EXCLUDED_FOLDERS:
            listed += _stdlib(entry, f"{prefix}{entry.name}/")
        elif entry.suffix == ".py" and entry.is_file():
            stat = entry.stat()
            listed.append(SourceFile(prefix + entry.name, stat.st_size, stat.st_mtime_ns))
    return listed
