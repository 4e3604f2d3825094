"""A model's directory, looked at by its configuration and the headers of its files: no weights are read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from pyarrow import fs

from overproof.data.manifest import TOKENIZER
from overproof.data.sources import CONVERTIBLE
from overproof.errors import InputError
from overproof.files import absolute_uri, filesystem, read_bytes
from overproof.models.pretrained import list_directory, weight_files
from overproof.models.sizes import family_of
from overproof.registry import FAMILIES
from overproof.units import format_bytes

EXPECTED = "expected a Hugging Face directory: config.json and *.safetensors"
CHAT_TEMPLATES = ("chat_template.jinja", "tokenizer_config.json")  # where one may stand; the second as a key


@dataclass(frozen=True)
class GivenModel:
    """What a directory says of itself."""

    path: str  # absolute, or a URI
    config: Mapping[str, Any]  # with the path as `_name_or_path`, as transformers has it
    family: str
    size_bytes: int  # of the weights
    tokenizer_bytes: int  # of tokenizer.json, or of what one is made from; 0 where there is none
    has_chat_template: bool

    @property
    def tasks(self) -> tuple[str, ...]:
        """Kinds of the tasks that its family may be trained for."""
        return FAMILIES[self.family].tasks

    @property
    def described(self) -> str:
        """For people."""
        kind = self.config["architectures"][0]
        parts = [f"{kind}, {format_bytes(self.size_bytes)} of weights"]
        if self.tokenizer_bytes:
            parts.append(f"with a tokenizer and {'a' if self.has_chat_template else 'no'} chat template")
        return ", ".join(parts)


def inspect_model(path: str) -> GivenModel:
    """Look at a directory, local or behind a URI.

    Raises:
        InputError: there is none, it is no Hugging Face directory, holds a pickle, or is of an unknown family.
    """
    files, root = filesystem(path)
    kind = files.get_file_info(root).type
    if kind == fs.FileType.NotFound:
        raise InputError(f"MODEL {path}: no such folder; {EXPECTED}, or - where a teacher is to be trained")
    if kind == fs.FileType.File:
        raise InputError(f"MODEL {path}: is {_named(path)}; {EXPECTED}")
    listed = {name: size for name, size, _ in list_directory(path)}
    if "config.json" not in listed or not any(name.endswith(".safetensors") for name in listed):
        ggufs = [name for name in listed if name.endswith(".gguf")]
        found = f"holds {_named(ggufs[0])} ({ggufs[0]})" if ggufs else f"holds {', '.join(sorted(listed)[:5])}"
        raise InputError(f"MODEL {path}: {found}; {EXPECTED}")
    config = _read_json(files, f"{root}/config.json") | {"_name_or_path": absolute_uri(path)}
    family, _ = family_of(config, path)
    beside = _read_json(files, f"{root}/{CHAT_TEMPLATES[1]}") if CHAT_TEMPLATES[1] in listed else {}
    return GivenModel(
        absolute_uri(path),
        config,
        family,
        sum(listed[PurePosixPath(file).name] for file in weight_files(files, root)),
        listed.get(TOKENIZER) or sum(listed.get(name, 0) for name in CONVERTIBLE),
        CHAT_TEMPLATES[0] in listed or "chat_template" in beside,
    )


def _named(file: str) -> str:
    """What a file is that stands where a directory is expected."""
    if file.endswith(".gguf"):
        return "a GGUF file, which is quantised and made to be served, not trained"
    return "a file"


def _read_json(files: fs.FileSystem, path: str) -> dict[str, Any]:
    try:
        found = json.loads(read_bytes(files, path))
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}; {EXPECTED}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: holds {type(found).__name__}; {EXPECTED}")
    return found
