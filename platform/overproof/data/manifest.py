"""What a prepared data set holds: its task, shards, columns, rows, and the identity of its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from overproof.artifacts import Artifact, local_folder
from overproof.data.columns import packed_field
from overproof.data.order import Order
from overproof.errors import InputError
from overproof.files import FileEntry, file_sha256, read_json
from overproof.units import format_count

MANIFEST = "manifest.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
DOCUMENTS = "documents.parquet"
TEST_TEXTS = "test_texts.parquet"  # how some test documents begin, as they were before they were tokens
SPLITS = ("train", "validation", "test")
SAMPLE_ID = "sample_id"
# Columns of rows of tokens that hold several texts, none of which sees another; rows have one of them at most:
START = "start"  # which token begins each of the texts
POSITION = "position"  # of each token in its text
CLUSTER = "cluster"  # column, of shards or of ``DOCUMENTS``: the test rows, or documents, that are resampled as one


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Shard(_Frozen):
    """One Parquet file."""

    path: str  # relative to the manifest
    sha256: str
    size_bytes: int
    rows: int
    predictions: int  # what a pass over the shard is trained or scored on


class Split(_Frozen):
    """The shards of one split, in the order that numbers its rows."""

    shards: tuple[Shard, ...]
    rows: int
    predictions: int
    documents: int  # that the rows come from; as many as rows where a row is one


class Column(_Frozen):
    """One column of every shard: the numbers that each row has in it."""

    name: str
    dtype: str  # numpy's, such as "<f4"
    shape: tuple[int, ...] = ()  # of one row's value; () is a single number
    batch: bool = True  # whether models read it


class NearDuplicatesFound(_Frozen):
    """What was done about near-copies, by which settings (see ``config.data.NearDuplicates``)."""

    threshold: float
    words: int
    documents: int  # left out of the train split
    train_bytes_share: float  # of that split, as it was before
    test_documents: int  # that had a near-copy in the train split
    test_bytes_share: float
    test_clusters: int  # that test documents are resampled in; as many as there are documents where none are copies

    @property
    def summary(self) -> str:
        """For people, a sentence."""
        told_by = f"the Jaccard index of runs of {self.words} words is {self.threshold:g} at least"
        if not self.documents:
            return f"No train document was a near-copy of a held-out one ({told_by})."
        return (
            f"{format_count(self.documents, 'train document')}, {100 * self.train_bytes_share:.2g} % of that split's "
            f"bytes, near-copies of held-out ones ({told_by}), left out: "
            f"{format_count(self.test_documents, 'test document')}, {100 * self.test_bytes_share:.2g} % of theirs, had "
            "one among them."
        )


class Manifest(_Frozen):
    """The content of ``manifest.json``. Row ``i`` of a split has ``sample_id`` i, counted through its shards."""

    format: Literal[6] = 6
    task: str
    columns: tuple[Column, ...]  # beside sample_id
    splits: dict[str, Split]
    rows_per_group: int
    positions: int  # P: predictions in a row
    outputs: int  # V: entries of the vocabulary, classes, or bins
    tokenizer_sha256: str | None = None
    start_id: int | None = None  # of the token before every document; tokens have all three, other rows none of them
    end_id: int | None = None  # of the token after every document
    bos_id: int | None = None  # of the token that the tokenizer calls bos, whether it puts it before a text or not
    dropped: dict[str, int] = {}  # documents left out, per reason
    skipped: dict[str, int] = {}  # files left out, per reason
    altered: int = 0  # documents that their tokens write back otherwise than they are
    near_duplicates: NearDuplicatesFound | None = None  # None: rows have no words, or it was switched off
    details: dict[str, Any] = {}  # what the task says of its rows, such as the names of classes

    @classmethod
    def read(cls, source: Path | Artifact) -> Manifest:
        """Read ``manifest.json`` of a folder, or of an artifact, of which it is fetched alone.

        Raises:
            InputError: it is missing or not a manifest of this format.
        """
        return read_json(cls, local_folder(source, MANIFEST) / MANIFEST)

    @property
    def shard_entries(self) -> dict[str, FileEntry]:
        """What each shard's file is, by name."""
        shards = (shard for split in self.splits.values() for shard in split.shards)
        return {shard.path: FileEntry(sha256=shard.sha256, size_bytes=shard.size_bytes) for shard in shards}

    def order(self, seed: int) -> Order:
        """The order in which the train split is trained on."""
        return Order(self.groups, self.rows_per_group, seed)

    @property
    def groups(self) -> int:
        """Row groups of the train split; each holds exactly ``rows_per_group`` rows."""
        return self.splits["train"].rows // self.rows_per_group

    @property
    def apart(self) -> bool:
        """Whether rows hold several texts, none of which sees another."""
        return any(column.name in (START, POSITION) for column in self.columns)

    @property
    def apart_id(self) -> int | None:
        """The token that begins each document, where none in a row sees another by it; None where rows have no such
        column.
        """
        return self.start_id if any(column.name == START for column in self.columns) else None

    @property
    def batch_columns(self) -> tuple[str, ...]:
        """The columns that models read."""
        return tuple(column.name for column in self.columns if column.batch)

    def tokenizer(self, source: Path | Artifact) -> Path | None:
        """The tokenizer.json that lies beside the manifest, where the rows are of tokens.

        Raises:
            InputError: it is not the one that the rows were made with.
        """
        if self.tokenizer_sha256 is None:
            return None
        file = local_folder(source, TOKENIZER) / TOKENIZER
        found = file_sha256(file)
        if found != self.tokenizer_sha256:
            raise InputError(
                f"{file}: sha256 is {found[:12]}…; expected {self.tokenizer_sha256[:12]}…, of the tokenizer that split "
                "the texts of these rows: it was changed since; put it back, or prepare the data again"
            )
        return file

    @property
    def schema(self) -> pa.Schema:
        """The columns of every shard, as Parquet and Arrow hold them; none may be null."""
        return shard_schema(self.columns)


def shard_schema(columns: tuple[Column, ...]) -> pa.Schema:
    """``sample_id`` and these columns."""
    fields = [
        packed_field(column.name, np.dtype(column.dtype), column.shape)
        if column.shape
        else pa.field(column.name, pa.from_numpy_dtype(np.dtype(column.dtype)), nullable=False)
        for column in columns
    ]
    return pa.schema([pa.field(SAMPLE_ID, pa.int64(), nullable=False), *fields])
