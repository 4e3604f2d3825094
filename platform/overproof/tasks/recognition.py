"""What `overproof shrink` sees of data before their task is known, and what a task makes of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

from pyarrow import fs

from overproof.data.source_files import (
    FileListing,
    OnError,
    SourceFile,
    any_name,
    data_suffix,
    describe_skipped,
    list_all,
    open_content,
)
from overproof.errors import InputError
from overproof.files import absolute_uri, filesystem
from overproof.tasks.table_samples import TABLES, TableSample, UnreadableTable, sample_tables


@dataclass(frozen=True)
class DataLook:
    """A file or folder, looked at."""

    path: str  # absolute, or a URI
    single: bool  # it is one file
    files: Mapping[str, int]  # how many files end so (see ``data_suffix``): {".csv": 2}
    size_bytes: Mapping[str, int]  # of those
    names: tuple[str, ...]  # of the files, from the folder on
    tables: Mapping[str, TableSample]  # by suffix
    unreadable: Mapping[str, str]  # by suffix of tables: what is wrong with them
    listing: FileListing
    on_error: OnError  # as the recipe will have it

    def named(self, *suffixes: str) -> list[str]:
        """The names of the files that end so."""
        return [name for name in self.names if data_suffix(name) in suffixes]

    def content(self, name: str) -> Any:
        """A file as a stream of bytes."""
        files, _ = filesystem(self.path)
        return open_content(files, f"{self.listing.root}/{name}")

    def having(self, *suffixes: str) -> list[str]:
        """Those of the suffixes that files end with."""
        return [suffix for suffix in suffixes if suffix in self.files]

    def sample(self, suffix: str) -> TableSample | Misfit:
        """The first rows of the tables that end so; or why they cannot be read, which only who needs them minds."""
        return self.tables.get(suffix) or Misfit(self.unreadable[suffix])

    def others(self, *suffixes: str) -> str:
        """What lies there beside files that end so, for a message; empty where there is nothing."""
        left = {suffix: count for suffix, count in self.files.items() if suffix not in suffixes}
        return ", ".join(f"{count:,} {suffix or 'without a suffix'}" for suffix, count in left.items())

    @property
    def described(self) -> str:
        """What lies there, for a message."""
        return self.others()


@dataclass(frozen=True)
class ColumnFlags:
    """What the command line says of the data; None leaves it to be found out."""

    label: str | None = None
    text: str | None = None
    image: str | None = None
    pattern: tuple[str, ...] = ()
    image_size: int | None = None

    @property
    def given(self) -> dict[str, str | int | tuple[str, ...]]:
        """Those that were given, as they are typed."""
        values = {
            "--label": self.label, "--text": self.text, "--image": self.image,
            "--pattern": self.pattern or None,
            "--image-size": self.image_size,
        }  # fmt: skip
        return {flag: value for flag, value in values.items() if value is not None}


@dataclass(frozen=True)
class Fit:
    """The data are for the task: what its recipe says of them."""

    data: Mapping[str, Any]  # fields of the recipe's section, `kind` and how rows are split left out
    rows: int  # about how many rows a model reads
    units: int  # about how many documents, images or rows are split into train, validation and test
    reasons: Mapping[str, str]  # what was chosen, and why
    values: Mapping[str, Any] = field(default_factory=dict)  # further names that the template may use
    refit: str | None = None  # why a given teacher cannot be taken as it is, where it has to learn first
    flags: frozenset[str] = frozenset()  # those that have a say in it: another that was given is a mistake


@dataclass(frozen=True)
class Misfit:
    """The data are not for the task."""

    why: str


@dataclass(frozen=True)
class Question:
    """The data may be for the task, and something must be said first."""

    flag: str
    text: str


Recognised = Fit | Misfit | Question


@runtime_checkable
class Shrinkable(Protocol):
    """What a task has beside, for `overproof shrink` to find and start it."""

    template: str  # a file in `tasks/templates`

    def recognise(self, look: DataLook, model: Mapping[str, Any] | None, flags: ColumnFlags) -> Recognised:
        """Whether data are for the task. ``model`` is the given teacher's config.json, with its path as
        ``_name_or_path``; None where one is trained.
        """


def look_at(path: str, on_error: OnError = "fail") -> DataLook:
    """List what lies at a path, and read the first rows of its tables; of those that can be read, where others are to
    be left out (``on_error``).

    Raises:
        InputError: there is nothing. A table that is not what its name says is only told of: it may not matter.
    """
    files, root = filesystem(path)
    kind = files.get_file_info(root).type
    if kind == fs.FileType.NotFound:
        raise InputError(f"--data {path}: no such file or folder; expected text, JSONL, Parquet, CSV or images")
    listing = list_all(path, any_name, "text, JSONL, Parquet, CSV or images", "skip", "--data")
    if not any(file.size_bytes for file in listing.files):
        beside = "".join(f"; {line}" for line in describe_skipped(listing.skipped))
        raise InputError(f"--data {path}: is empty; expected text, JSONL, Parquet, CSV or images{beside}")
    single = kind == fs.FileType.File
    by_suffix: dict[str, list[SourceFile]] = {}
    for file in listing.files:
        by_suffix.setdefault(data_suffix(file.name), []).append(file)
    tables, unreadable = {}, {}
    for suffix in TABLES:
        if suffix in by_suffix:
            try:
                tables[suffix] = sample_tables(
                    files, replace(listing, files=tuple(by_suffix[suffix])), suffix, on_error
                )
            except UnreadableTable as error:
                unreadable[suffix] = str(error)
    return DataLook(
        absolute_uri(path),
        single,
        dict(Counter({suffix: len(own) for suffix, own in by_suffix.items()}).most_common()),
        {suffix: sum(file.size_bytes for file in own) for suffix, own in by_suffix.items()},
        tuple(file.name for file in listing.files),
        tables,
        unreadable,
        listing,
        on_error,
    )


def choose_column(
    sample: TableSample, asked: str | None, flag: str, usual: tuple[str, ...], possible: list[str], what: str
) -> tuple[str, str] | Question | Misfit:
    """A column and why: the one that was asked for, the only possible one, or the only one with a usual name."""
    if asked is not None:
        if asked in sample.mixed:
            return Misfit(f"column {asked!r} holds {sample.mixed[asked]}; expected one kind of values")
        if asked not in sample.schema.names:
            return Question(flag, f"found no column {asked!r}; the columns are {sample.listed}")
        if asked not in possible:
            return Misfit(f"column {asked!r} is {sample.schema.field(asked).type}, which cannot be {what}")
        return asked, "as asked"
    mixed = next((name for name in sample.mixed if name.lower() in usual), None)
    if mixed is not None:
        return Question(
            flag, f"column {mixed!r} holds {sample.mixed[mixed]}; make them of one kind, or name another column"
        )
    if not possible:
        return Misfit(f"no column can be {what}: {sample.listed}")
    if len(possible) == 1:
        return possible[0], f"the only column that can be {what}"
    named = [name for name in possible if name.lower() in usual]
    if len(named) == 1:
        return named[0], "by its name"
    which = f"{', '.join(named)} are all called like it" if named else "none is called like it"
    return Question(flag, f"which column is {what}: {which}; the columns are {sample.listed}")
