"""What serving takes from the environment: API keys. The one file of `serve` that reads it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from overproof.errors import InputError

KEY_VARIABLE = "OVERPROOF_API_KEY"
KEY_FILE_VARIABLE = "OVERPROOF_API_KEY_FILE"
KEYS_VARIABLE = "OVERPROOF_KEYS"

_hidden: list[str] = []  # keys that were taken out of the environment; the last one counts


def api_key() -> str | None:
    """The key that requests may carry; None where none is given. Files and variables often end in a newline.

    Raises:
        InputError: the file that should hold it cannot be read, or holds none.
    """
    key = os.environ.get(KEY_VARIABLE, "").strip() or (_hidden[-1] if _hidden else "")
    if key:
        return key
    file = os.environ.get(KEY_FILE_VARIABLE, "").strip()
    if not file:
        return None
    try:
        key = Path(file).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{KEY_FILE_VARIABLE}: {file}: {error}; expected a file that holds a key") from None
    if not key:
        raise InputError(f"{KEY_FILE_VARIABLE}: {file}: empty; expected a file that holds a key")
    return key


def is_key_inherited() -> bool:
    """Whether the key itself is in the environment of this process."""
    return KEY_VARIABLE in os.environ


def key_in_shell() -> str:
    """How a shell with this environment writes the key."""
    return f"${KEY_VARIABLE}" if is_key_inherited() or _hidden else f'$(cat "${KEY_FILE_VARIABLE}")'


def keys_uri() -> str | None:
    """File or URI of the keys that requests may carry; None where none is given."""
    return os.environ.get(KEYS_VARIABLE, "").strip() or None


@contextmanager
def hidden_api_key() -> Iterator[None]:
    """Take the key out of the environment, which every process that is started meanwhile inherits: Ray's daemons, and
    each of their workers. It can still be asked for here.
    """
    found = os.environ.pop(KEY_VARIABLE, None)
    if found is None:
        yield
        return
    _hidden.append(found.strip())
    try:
        yield
    finally:
        _hidden.pop()
        os.environ[KEY_VARIABLE] = found
