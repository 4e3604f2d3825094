"""What one Ray Data task does with one block of documents. No Ray here: blocks in, blocks out.

N documents, R rows, S = T + 1 tokens in a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from tokenizers import Tokenizer

from overproof.config import TextData
from overproof.data import cleaning, tokenization
from overproof.data.columns import token_dtype
from overproof.data.documents import iter_documents
from overproof.data.manifest import Column, shard_schema
from overproof.data.order import permutation
from overproof.data.parquet_writer import write_shard
from overproof.data.sources import Source
from overproof.errors import InputError

TABLE_BYTES = 8 << 20  # of text handed on at once
SHARD_STREAM = 1 << 32  # sets the permutation inside a shard apart from those of `Order`


def read_block(block: pa.Table, source: Source) -> Iterator[pa.Table]:
    """The documents of the files that a block lists: their content and what the rules say of each alone.

    A file that is not what the recipe says becomes a row with its ``error``: raised here, it would reach the
    driver as a traceback.
    """
    rows: list[tuple[str, bytes, str]] = []
    size_bytes = 0
    for file in chain.from_iterable(block["files"].to_pylist()):
        try:
            for name, content in iter_documents(source, file):
                rows.append((name, content, ""))
                size_bytes += len(content)
                if size_bytes >= TABLE_BYTES:
                    yield _found(rows)
                    rows, size_bytes = [], 0
        except InputError as error:
            rows.append((file, b"", str(error)))
    yield _found(rows)


def _found(rows: Sequence[tuple[str, bytes, str]]) -> pa.Table:
    return pa.table(
        {
            "name": pa.array([name for name, _, _ in rows], pa.string()),
            "content": pa.array([content for _, content, _ in rows], pa.large_binary()),
            "sha256": pa.array([cleaning.content_hash(content) for _, content, _ in rows], pa.string()),
            "size_bytes": pa.array([len(content) for _, content, _ in rows], pa.int64()),
            "fault": pa.array([cleaning.document_fault(content) for _, content, _ in rows], pa.string()),
            "error": pa.array([error for _, _, error in rows], pa.string()),
        }
    )


@dataclass(frozen=True)
class ShardAssignment:
    """Where each kept document goes; sorted by hash, so that document i is the i-th."""

    hashes_N: NDArray[np.bytes_]
    names_N: NDArray[np.bytes_]
    parts_N: NDArray[np.int32]  # train shards first, then validation, then test
    shards: int

    def find(self, block: pa.Table) -> tuple[pa.Table, NDArray[np.int64]]:
        """The rows of a block that are kept, and their documents."""
        hashes, names = (fixed_width_strings(block[column].to_pylist()) for column in ("sha256", "name"))
        document = np.minimum(np.searchsorted(self.hashes_N, hashes), len(self.hashes_N) - 1)
        kept = (self.hashes_N[document] == hashes) & (self.names_N[document] == names)
        return block.filter(pa.array(kept)), document[kept]


@dataclass(frozen=True)
class ShardPlan:
    """One shard before it is written."""

    split: str
    index: int  # in its split
    first_sample: int
    rows: int

    @property
    def path(self) -> str:
        return f"{self.split}/{self.index:05d}.parquet"


def fixed_width_strings(values: Sequence[str] | NDArray[Any]) -> NDArray[np.bytes_]:
    """Strings as one flat array, which tasks share without a copy."""
    return np.array([value.encode() for value in values], np.bytes_)


@lru_cache(maxsize=1)
def _from_json(tokenizer_json: str) -> Tokenizer:
    return Tokenizer.from_str(tokenizer_json)


def tokenise_block(block: pa.Table, placement: ShardAssignment, tokenizer_json: str) -> pa.Table:
    """The kept documents of a block as tokens, with the part each goes to."""
    own, documents = placement.find(block)
    encoded = tokenization.encode(_from_json(tokenizer_json), [content.as_py().decode() for content in own["content"]])
    return pa.table(
        {
            "part": pa.array(placement.parts_N[documents], pa.int32()),
            "document": pa.array(documents, pa.int32()),
            "tokens": pa.array(encoded, pa.large_list(pa.int32())),
            "tokens_count": pa.array([len(ids) for ids in encoded], pa.int64()),
        }
    )


def text_columns(sequence_length: int, vocab_size: int) -> tuple[Column, ...]:
    """Of a text shard: a row's sequence_length + 1 tokens, of which ``length`` + 1 are there; its document, or -1."""
    return (
        Column(name="document", dtype="<i4", batch=False),
        Column(name="tokens", dtype=token_dtype(vocab_size), shape=(sequence_length + 1,)),
        Column(name="length", dtype="<i4"),
    )


def write_planned_shard(
    group: pa.Table, parts: Sequence[ShardPlan], data: TextData, vocab_size: int, seed: int, uri: str
) -> pa.Table:
    """Pack and write one shard from its documents, whatever order they arrive in."""
    index = group["part"][0].as_py()
    part, length = parts[index], data.sequence_length
    group = group.take(np.argsort(group["document"].to_numpy(), kind="stable"))
    documents = [value.values.to_numpy() for value in group["tokens"]]
    if part.split == "train":
        rows_RS = tokenization.pack_stream(documents, length, part.rows)
        order_R = permutation(seed, 0, SHARD_STREAM + part.index, part.rows)
        columns = tokenization.token_columns(part.first_sample, rows_RS[order_R], length, -1)
    else:
        packed = [tokenization.pack_document(document, length) for document in documents]
        owners_R = np.repeat(group["document"].to_numpy(), [len(rows) for rows, _ in packed])
        rows_RS, lengths_R = (np.concatenate(values) for values in zip(*packed, strict=True))
        columns = tokenization.token_columns(part.first_sample, rows_RS, lengths_R, owners_R)
    fields, predictions = shard_schema(text_columns(length, vocab_size)), int(columns["length"].sum())
    shard = write_shard(uri, part.path, columns, fields, data.rows_per_group, predictions)
    return pa.table({"part": pa.array([index], pa.int32()), "shard": [shard.model_dump_json()]})
