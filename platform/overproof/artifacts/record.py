"""The record of an artifact, ``artifact.json``: what it was made from and by, its files and what they hash to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from overproof.errors import InputError
from overproof.files import OBJECT_STORES, FileEntry, filesystem, first_validation_error, read_bytes

RECORD = "artifact.json"
RECORD_FORMAT = 2  # goes up with what a record holds, and with what fingerprints are made of
TOOLS = ("overproof", "ray", "deepspeed", "torch", "transformers", "pyarrow", "gguf", "xllamacpp", "onnxruntime")


class StoreUnavailable(InputError):
    """What a store holds cannot be told now: it may well be there, and whole."""


class Record(BaseModel):
    """The content of ``artifact.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    format: int = RECORD_FORMAT
    recipe: str
    stage: str
    fingerprint: str
    config: Any
    parents: dict[str, str]  # stage -> fingerprint
    files: dict[str, FileEntry]
    metrics: dict[str, Any]
    seconds: float
    created: str  # UTC, ISO 8601
    versions: dict[str, str]


def read_record(uri: str) -> Record | None:
    """The record of the artifact at a folder or URI; None where there is none.

    Raises:
        InputError: there is a file, and it is not what this version writes.
    """
    files, folder = filesystem(uri)
    path = f"{folder}/{RECORD}"
    expected = "expected the record of a finished artifact: run its recipe again"
    try:
        content = read_bytes(files, path)
    except FileNotFoundError:
        return None
    except OSError as error:
        if files.type_name in OBJECT_STORES:
            raise StoreUnavailable(f"{uri}: cannot be read: {error}; run again when it can") from None
        raise InputError(f"{path}: cannot be read: {error}; {expected}") from None
    if not content.strip(b"\0"):
        raise InputError(f"{path}: found {len(content)} bytes, all of them NUL; {expected}")
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        raise InputError(f"{path}: found {content[:20]!r}…, which is no JSON; {expected}") from None
    if not isinstance(tree, dict) or "format" not in tree:
        raise InputError(f"{path}: found JSON without a format; {expected}")
    if tree["format"] != RECORD_FORMAT:
        raise InputError(
            f"{path}: found format {tree['format']!r}, and this version reads {RECORD_FORMAT}; run its recipe again, "
            "or use the version that wrote it"
        )
    try:
        return Record.model_validate(tree)
    except ValidationError as error:
        raise InputError(f"{path}: {first_validation_error(error)}; {expected}") from None


def compute_fingerprint(stage: str, format: int, config: Any, parents: Mapping[str, str]) -> str:
    """Sha256 over the stage, its format version, its part of the recipe and its parents' fingerprints."""
    return json_sha256({"stage": stage, "format": format, "config": config, "parents": dict(parents)})


def json_sha256(value: Any) -> str:
    """Sha256, in hex, of a value as JSON, whatever the order of its fields."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def artifact_id(recipe: str, stage: str, fingerprint: str) -> str:
    """An artifact's name and its place in a store."""
    return f"{recipe}/{stage}-{fingerprint[:8]}"
