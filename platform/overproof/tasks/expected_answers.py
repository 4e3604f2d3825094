"""What a record says its answer must be, and the questions of the test split that go with it.

A model's answer is held against it as clients get it, without white space around it. Regular expressions are RE2's
(https://github.com/google/re2/wiki/Syntax), whose time grows with the length of a text alone, whatever the expression.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet as pq

from overproof.data.parquet_writer import parquet_bytes
from overproof.errors import InputError

EXPECTED = "expected.parquet"  # of prepared data; not there where no test record expects anything
SHAPES = """a text that the answer must be, or {"exact": "..."}, or {"regex": "..."}, which must be found in it"""
SHOWN = 60  # characters of what was found
UNLIKELY = "¤ ¤\n" * 5000  # an answer that no check should let pass
ROWS_PER_GROUP = 1 << 16


@dataclass(frozen=True)
class Expected:
    """A text that an answer must be, or a regular expression that must be found in it."""

    kind: Literal["exact", "regex"]
    text: str

    def holds(self, answer: str) -> bool:
        """Whether an answer is as expected."""
        found = answer.strip()
        if self.kind == "exact":
            return found == self.text
        return bool(pc.match_substring_regex(pa.array([found], pa.string()), pattern=self.text)[0].as_py())


@dataclass(frozen=True)
class AnswerCheck:
    """A question of the test split, as a server is asked it, and what the answer must be."""

    document: int
    name: str  # file, and line or row
    messages: list[dict[str, Any]]  # up to the answer
    tools: list[dict[str, Any]]
    expected: Expected


def read_expected(where: str, value: Any) -> Expected | None:
    """A record's ``expected``.

    Raises:
        InputError: it is none of the shapes, no regular expression, or lets every answer pass.
    """
    if value is None:
        return None
    given = {"exact": value} if isinstance(value, str) else value
    given = {key: each for key, each in given.items() if each is not None} if isinstance(given, dict) else {}
    kind, text = next(iter(given.items()), ("", None))
    if len(given) != 1 or kind not in ("exact", "regex") or not isinstance(text, str):
        raise InputError(f"{where}: expected holds {_shown(value)}; expected {SHAPES}")
    if kind == "exact":
        if not text.strip():
            raise InputError(f"{where}: expected holds {_shown(value)}; expected {SHAPES}: not an empty one")
        return Expected("exact", text.strip())
    found = Expected("regex", text)
    try:
        passes_all = found.holds("") and found.holds(UNLIKELY)
    except pa.ArrowInvalid as error:
        raise InputError(
            f"{where}: expected.regex holds {_shown(text)}: {error}; expected a regular expression of RE2, which has "
            "neither look-around nor back-references"
        ) from None
    if passes_all:
        raise InputError(
            f"{where}: expected.regex holds {_shown(text)}, which is found in every text; expected one that a wrong "
            "answer does not have"
        )
    return found


def checks_file(checks: Sequence[AnswerCheck]) -> bytes:
    """The checks as Parquet."""
    table = pa.table(
        {
            "document": pa.array([check.document for check in checks], pa.int32()),
            "name": pa.array([check.name for check in checks], pa.string()),
            "messages": pa.array([json.dumps(check.messages) for check in checks], pa.string()),
            "tools": pa.array([json.dumps(check.tools) for check in checks], pa.string()),
            "kind": pa.array([check.expected.kind for check in checks], pa.string()),
            "text": pa.array([check.expected.text for check in checks], pa.string()),
        }
    )
    return parquet_bytes(table, ROWS_PER_GROUP)


def read_checks(root: Path) -> list[AnswerCheck]:
    """Those of the data at ``root``, in the order of their contents' hashes; none where no test record has any."""
    if not (root / EXPECTED).exists():
        return []
    return [
        AnswerCheck(
            row["document"],
            row["name"],
            json.loads(row["messages"]),
            json.loads(row["tools"]),
            Expected(row["kind"], row["text"]),
        )
        for row in pq.read_table(root / EXPECTED).to_pylist()
    ]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
