"""Whether data are documents for a language model, and how its recipe names them."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatch
from typing import Any

import pyarrow.compute as pc

from overproof.tasks.recognition import (
    ColumnFlags,
    DataLook,
    Fit,
    Misfit,
    Question,
    Recognised,
    choose_column,
    is_text,
)

PLAIN_TEXT = frozenset(
    [
        ".txt",
        ".md",
        ".rst",
        ".org",
        ".tex",
        ".html",
        ".htm",
        ".xml",
        ".log",
        ".py",
        ".c",
        ".h",
        ".cc",
        ".cpp",
        ".hpp",
        ".cs",
        ".go",
        ".java",
        ".js",
        ".ts",
        ".rs",
        ".rb",
        ".sh",
        ".sql",
    ]
)
FEWEST_DOCUMENTS = 20  # that leave some for validation and test
BYTES_PER_TOKEN = 4  # of prose, in vocabularies of some ten thousand tokens
SEQUENCE_LENGTH, FEWEST_ROWS, SHORT_SEQUENCE = 256, 256, 64


def recognise_text(look: DataLook, model: Mapping[str, Any] | None, flags: ColumnFlags) -> Recognised:
    """Text files, or a column of text in JSONL or Parquet."""
    if model is None:
        return Misfit("a language model starts from one: give MODEL, a Hugging Face directory")
    tables = [suffix for suffix in (".jsonl", ".parquet") if suffix in look.tables]
    if len(tables) == 2 and flags.pattern is None:
        return Misfit(f"both JSONL and Parquet lie there ({look.described}); expected one of them")
    found = _column(look, tables[0], flags) if tables and flags.pattern is None else _files(look, flags)
    if not isinstance(found, Fit):
        return found
    if found.units < FEWEST_DOCUMENTS:
        return Misfit(f"{found.units} documents; expected {FEWEST_DOCUMENTS} at least, for train, validation and test")
    return found


def _column(look: DataLook, suffix: str, flags: ColumnFlags) -> Recognised:
    sample = look.tables[suffix]
    chosen = choose_column(
        sample, flags.text, "--text", ("text", "content", "document", "body"), sample.columns(is_text), "the text"
    )
    if not isinstance(chosen, tuple):
        return chosen
    name, why = chosen
    mean_bytes = pc.mean(pc.binary_length(sample.rows[name])).as_py() or 0.0
    source = {"kind": suffix[1:], "path": look.path, "field": name}
    return _fit(source, sample.total_rows, mean_bytes * sample.total_rows, f"column {name!r}: {why}")


def _files(look: DataLook, flags: ColumnFlags) -> Recognised:
    suffixes = [suffix for suffix in look.files if suffix in PLAIN_TEXT]
    if look.single and suffixes:
        return Misfit("one text file is one document; expected a folder of text files, JSONL or Parquet")
    pattern = flags.pattern
    if pattern is None:
        if not suffixes:
            return Misfit(f"no text files: {look.described}; name them, such as --pattern '*.txt', if they are text")
        if len(suffixes) > 1:
            return Question(
                "--pattern", f"which files are documents: {look.described}; give one, such as '*{suffixes[0]}'"
            )
        pattern = f"*{suffixes[0]}"
    documents = sum(fnmatch(name.rsplit("/", 1)[-1], pattern) for name in look.names)
    if not documents:
        return Question("--pattern", f"no file's name matches {pattern!r}: {look.described}")
    share = documents / len(look.names) if flags.pattern else 1.0
    size = share * sum(look.size_bytes.values()) if flags.pattern else look.size_bytes[suffixes[0]]
    source = {"kind": "folder", "path": look.path, "pattern": pattern}
    return _fit(source, documents, size, f"every file that matches {pattern} is one document")


def _fit(source: Mapping[str, Any], documents: int, size_bytes: float, why: str) -> Fit:
    tokens = int(size_bytes / BYTES_PER_TOKEN)
    length = SEQUENCE_LENGTH if tokens >= FEWEST_ROWS * SEQUENCE_LENGTH else SHORT_SEQUENCE
    return Fit(
        {"source": dict(source)},
        rows=max(1, tokens // length),
        units=documents,
        reasons={"documents": f"{documents:,}, about {tokens:,} tokens; {why}"},
        values={"sequence_length": length},
    )
