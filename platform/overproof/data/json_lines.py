"""JSON Lines: a value on each line, and where the one stands that is none."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from overproof.errors import InputError


def read_json_lines(lines: Iterable[bytes], path: str) -> Iterator[tuple[str, Any]]:
    """The values of a file, each with where it stands; lines of white space have none.

    Raises:
        InputError: a line is not UTF-8, or not JSON.
    """
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                yield where, read_json_line(line, where)
            except UnicodeDecodeError as error:
                raise InputError(f"{where}: not UTF-8: {error}; expected text in UTF-8") from None


def read_json_line(line: bytes, where: str) -> Any:
    """The value on a line.

    Raises:
        UnicodeDecodeError: it is not UTF-8.
        InputError: it is not JSON.
    """
    try:
        return json.loads(line)
    except UnicodeDecodeError:
        raise
    except RecursionError:
        raise InputError(f"{where}: nested too deeply; expected one JSON object on each line") from None
    except ValueError as error:
        raise InputError(f"{where}: not JSON: {error}; expected one JSON object on each line") from None
