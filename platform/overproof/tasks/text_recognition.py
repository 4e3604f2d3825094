"""Whether data are documents for a language model, and how its recipe names them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pyarrow.compute as pc

from overproof.data.parquet_columns import is_text
from overproof.data.source_files import matching
from overproof.models.sizes import family_of
from overproof.tasks.recognition import (
    ColumnFlags,
    DataLook,
    Fit,
    Misfit,
    Question,
    Recognised,
    choose_column,
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
        return Misfit("a language model starts from one: give MODEL, or write a recipe: docs/own-data.md")
    tables = look.having(".jsonl", ".parquet")
    if len(tables) == 2 and not flags.pattern:
        return Misfit(f"both JSONL and Parquet lie there ({look.described}); expected one of them")
    found = _column(look, tables[0], flags) if tables and not flags.pattern else _files(look, flags)
    if not isinstance(found, Fit):
        return found
    if found.units < FEWEST_DOCUMENTS:
        return Misfit(f"{found.units} documents; expected {FEWEST_DOCUMENTS} at least, for train, validation and test")
    _, family = family_of(model, model["_name_or_path"])
    across = family.section is None  # whether such a model keeps documents apart is not known
    return replace(found, values={**found.values, "cross_document_attention": str(across).lower()})


def _column(look: DataLook, suffix: str, flags: ColumnFlags) -> Recognised:
    texts = [each for each in look.files if each in PLAIN_TEXT]
    sample = look.sample(suffix)
    if isinstance(sample, Misfit):
        if not texts:
            return sample
        return Question(
            "--pattern", f"{sample.why}; if the text files are the documents, say so, such as '*{texts[0]}'"
        )
    chosen = choose_column(
        sample, flags.text, "--text", ("text", "content", "document", "body"), sample.columns(is_text), "the text"
    )
    if not isinstance(chosen, tuple):
        return chosen
    name, why = chosen
    mean_bytes = pc.mean(pc.binary_length(sample.rows[name])).as_py() or 0.0
    source = {"kind": suffix[1:], "path": look.path, "field": name}
    told = f"column {name!r}: {why}"
    if sample.part:
        told += f"; their length by a look {sample.part}"
    if texts:
        told += f"; {look.others(suffix)} beside are left out: --pattern takes files for documents"
    return _fit(source, sample.total_rows, mean_bytes * sample.total_rows, told, "--text")


def _files(look: DataLook, flags: ColumnFlags) -> Recognised:
    suffixes = [suffix for suffix in look.files if suffix in PLAIN_TEXT]
    if look.single and suffixes:
        return Misfit("one text file is one document; expected a folder of text files, JSONL or Parquet")
    patterns = flags.pattern
    if not patterns:
        if not suffixes:
            return Misfit(f"no text files: {look.described}; name them, such as --pattern '*.txt', if they are text")
        if len(suffixes) > 1:
            several = f"'*{suffixes[0]}' --pattern '*{suffixes[1]}'"
            return Question("--pattern", f"which files are documents: {look.described}; give one or more: {several}")
        patterns = (f"*{suffixes[0]}",)
    expected = " or ".join(patterns)
    documents = sum(matching(*patterns)(name) is None for name in look.names)
    if not documents:
        return Question("--pattern", f"no file's name matches {expected}: {look.described}")
    share = documents / len(look.names) if flags.pattern else 1.0
    size = share * sum(look.size_bytes.values()) if flags.pattern else look.size_bytes[suffixes[0]]
    source = {"kind": "folder", "path": look.path, "pattern": patterns[0] if len(patterns) == 1 else list(patterns)}
    return _fit(source, documents, size, f"every file that matches {expected} is one document", "--pattern")


def _fit(source: Mapping[str, Any], documents: int, size_bytes: float, why: str, flag: str) -> Fit:
    tokens = int(size_bytes / BYTES_PER_TOKEN)
    length = SEQUENCE_LENGTH if tokens >= FEWEST_ROWS * SEQUENCE_LENGTH else SHORT_SEQUENCE
    return Fit(
        {"source": dict(source)},
        rows=max(1, tokens // length),
        units=documents,
        reasons={"documents": f"{documents:,}, about {tokens:,} tokens; {why}"},
        values={"sequence_length": length},
        flags=frozenset({flag}),
    )
