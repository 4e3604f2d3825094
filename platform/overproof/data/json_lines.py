"""JSON Lines: a value on each line, and where the one stands that is none."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from overproof.data.source_files import SourceReading, UnreadableFile

NUL = b"\0"
BLANK = b" \t\r\n\v\f\0"
DEEPEST = 100  # of a value in a value; what reads further calls itself for each
NOT_JSON = "not JSON Lines"


def read_json_lines(lines: Iterable[bytes], path: str, reading: SourceReading) -> Iterator[tuple[str, Any]]:
    """The values of a file, each with where it stands; lines of white space or of NULs have none, and
    ``reading`` counts the latter.

    Raises:
        UnreadableFile: a line is not UTF-8, or not JSON.
    """
    for number, line in enumerate(lines, start=1):
        if line.strip(BLANK):
            where = f"{path}, line {number}"
            try:
                yield where, read_json_line(line, where)
            except UnicodeDecodeError as error:
                raise UnreadableFile(f"{where}: not UTF-8: {error}; expected text in UTF-8", "not UTF-8") from None
        elif NUL in line:
            reading.nul_lines += 1


def read_json_line(line: bytes, where: str) -> Any:
    """The value on a line.

    Raises:
        UnicodeDecodeError: it is not UTF-8.
        UnreadableFile: it is not JSON, or nested deeper than ``DEEPEST``.
    """
    try:
        found = json.loads(line)
    except UnicodeDecodeError:
        raise
    except RecursionError:
        raise _too_deep(where) from None
    except ValueError as error:
        raise UnreadableFile(f"{where}: not JSON: {error}; expected one JSON object on each line", NOT_JSON) from None
    if line.count(b"[") + line.count(b"{") > DEEPEST and _is_deeper(found, DEEPEST):
        raise _too_deep(where)
    return found


def _is_deeper(value: Any, most: int) -> bool:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(most):
        level = [
            each
            for parent in level
            for each in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(each, dict | list)
        ]
        if not level:
            return False
    return True


def _too_deep(where: str) -> UnreadableFile:
    return UnreadableFile(
        f"{where}: nested too deeply; expected one JSON object on each line, of values in {DEEPEST} others at most",
        "JSON nested too deeply",
    )
