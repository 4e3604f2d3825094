"""What a prepared data set holds: shards, rows, tokens and the identity of its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from overproof.data.order import Order
from overproof.files import read_json

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
DOCUMENTS = "documents.parquet"
FORMAT: Literal[3] = 3
SPLITS = ("train", "validation", "test")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Shard(_Frozen):
    """One Parquet file."""

    path: str  # relative to the manifest
    sha256: str
    size_bytes: int
    rows: int
    tokens: int  # predictions: what a pass over the shard is trained or scored on


class Split(_Frozen):
    """The shards of one split, in the order that numbers its rows."""

    shards: tuple[Shard, ...]
    rows: int
    tokens: int
    documents: int


class Manifest(_Frozen):
    """The content of ``manifest.json``. Row ``i`` of a split has ``sample_id`` i, counted through its shards."""

    format: Literal[3] = FORMAT
    kind: Literal["text", "digits"]
    splits: dict[str, Split]
    rows_per_group: int
    sequence_length: int | None
    vocab_size: int | None
    classes: int | None
    tokenizer_sha256: str | None
    dropped: dict[str, int]  # documents left out, per reason

    @classmethod
    def read(cls, root: Path) -> Manifest:
        """Read ``root/manifest.json``.

        Raises:
            InputError: it is missing or not a manifest of this format.
        """
        return read_json(cls, root / MANIFEST)

    def order(self, seed: int) -> Order:
        """The order in which the train split is trained on."""
        return Order(self.groups, self.rows_per_group, seed)

    @property
    def groups(self) -> int:
        """Row groups of the train split; each holds exactly ``rows_per_group`` rows."""
        return self.splits["train"].rows // self.rows_per_group

    @property
    def outputs(self) -> int:
        """V: entries of the vocabulary, or classes."""
        if self.kind == "text":
            assert self.vocab_size is not None
            return self.vocab_size
        assert self.classes is not None
        return self.classes

    @property
    def positions(self) -> int:
        """P: predictions in a row."""
        if self.kind == "text":
            assert self.sequence_length is not None
            return self.sequence_length
        return 1
