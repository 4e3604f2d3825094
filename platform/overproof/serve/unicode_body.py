"""Lone surrogates in a body: JSON can write them (RFC 8259 section 8.2), and nothing that takes text can read them."""

from __future__ import annotations

import json
import re
from typing import Any

from overproof.errors import InputError
from overproof.files import is_unicode

# Half of a pair, as an escape or in bytes that are no UTF-8; a backslash that is escaped itself looks like one, too.
SUSPICION = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])"
    rb"|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F][0-9a-fA-F]{2}"
    rb"|\xed[\xa0-\xbf]"
)


def require_unicode_body(body: bytes) -> None:
    """Look whether all text in a body is valid Unicode.

    Raises:
        InputError: it is not; the message says where.
    """
    if SUSPICION.search(body) is None:
        return
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return  # whoever parses it says more
    path = surrogate_path(content)
    if path is not None:
        raise InputError(f"{path}: expected valid Unicode; found half of a surrogate pair")


def surrogate_path(content: Any) -> str | None:
    """Where the first text with half of a surrogate pair stands in a value of JSON; None where all are valid."""
    waiting: list[tuple[str, Any]] = [("", content)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, str):
            if not is_unicode(value):
                return path
        elif isinstance(value, dict):
            for name, each in value.items():
                if not is_unicode(name):
                    return path or "a field's name"
                waiting.append((f"{path}.{name}".lstrip("."), each))
        elif isinstance(value, list):
            waiting += [(f"{path}.{index}".lstrip("."), each) for index, each in enumerate(value)]
    return None
