"""The chat template that lies beside a tokenizer: in a file of its own, or in ``tokenizer_config.json``, alone or as
one of several by name, of which the one called ``default`` is meant.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pyarrow import fs

from overproof.errors import InputError
from overproof.files import filesystem, read_bytes

CHAT_TEMPLATE = "chat_template.jinja"
CONFIG_FILES = ("special_tokens_map.json", "tokenizer_config.json")  # the later holds
DEFAULT = "default"


def template_files(path: str) -> dict[str, str]:
    """The files of a directory, or beside a file of it, that say how messages are written, by name."""
    files, found = filesystem(path)
    is_file = files.get_file_info(found).type == fs.FileType.File
    folder = found.rpartition("/")[0] if is_file else found.rstrip("/")
    contents = {}
    for name in (CHAT_TEMPLATE, *CONFIG_FILES):
        if files.get_file_info(f"{folder}/{name}").type == fs.FileType.File:
            contents[name] = read_bytes(files, f"{folder}/{name}").decode("utf-8", "replace")
    return contents


def read_object(text: str | bytes, name: str) -> dict[str, Any]:
    """The content of a JSON file beside a tokenizer; empty where it is no object.

    Raises:
        InputError: it is not JSON.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name}, beside the tokenizer: not JSON: {error}") from None
    return found if isinstance(found, dict) else {}


def named_templates(files: Mapping[str, str]) -> dict[str, str]:
    """The templates of ``template_files``, by name; one alone is the default one.

    Raises:
        InputError: ``tokenizer_config.json`` is not JSON.
    """
    if files.get(CHAT_TEMPLATE, "").strip():
        return {DEFAULT: files[CHAT_TEMPLATE]}
    found = read_object(files.get(CONFIG_FILES[1], "{}"), CONFIG_FILES[1]).get("chat_template")
    if isinstance(found, str):
        return {DEFAULT: found} if found.strip() else {}
    pairs: list[tuple[Any, Any]] = []
    if isinstance(found, list):
        pairs = [(each.get("name"), each.get("template")) for each in found if isinstance(each, dict)]
    elif isinstance(found, dict):
        pairs = list(found.items())
    return {name: text for name, text in pairs if isinstance(name, str) and isinstance(text, str)}


def require_default(files: Mapping[str, str], path: str) -> str | None:
    """The template that is meant where none is named; None where there is none at all.

    Raises:
        InputError: there are several, and none is called ``default``.
    """
    found = named_templates(files)
    if found and DEFAULT not in found:
        raise InputError(
            f"{path}: its chat templates are named {', '.join(found)}; expected one named {DEFAULT!r}, by which "
            f"messages are written: save the one that is meant as {CHAT_TEMPLATE} beside"
        )
    return found.get(DEFAULT)
