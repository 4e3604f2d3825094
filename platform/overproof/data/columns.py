"""Which columns each kind of shard has, and how many numbers of one row are packed into one value of fixed width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from overproof.data.manifest import Manifest

DTYPE = b"dtype"  # in a field's metadata: the numpy type of the numbers whose bytes a row holds
UINT16_VOCABULARY = 1 << 16


def text_schema(sequence_length: int, vocab_size: int) -> pa.Schema:
    """The columns of a text shard; none may be null.

    A row's sequence_length + 1 tokens are unsigned numbers, two bytes each where the vocabulary allows it.
    """
    token_dtype = np.dtype("<u2" if vocab_size <= UINT16_VOCABULARY else "<u4")
    return pa.schema(
        [
            pa.field("sample_id", pa.int64(), nullable=False),
            pa.field("document", pa.int32(), nullable=False),
            packed_field("tokens", token_dtype, sequence_length + 1),
            pa.field("length", pa.int32(), nullable=False),
        ]
    )


def digits_schema() -> pa.Schema:
    """The columns of a shard of images; none may be null."""
    return pa.schema(
        [
            pa.field("sample_id", pa.int64(), nullable=False),
            packed_field("pixels", np.dtype("<f4"), 64),
            pa.field("label", pa.int32(), nullable=False),
        ]
    )


def packed_field(name: str, dtype: np.dtype[Any], count: int) -> pa.Field:
    """A column of ``count`` numbers a row, as their bytes: every value has one width, so its offset is arithmetic.

    The field's metadata has their type.
    """
    return pa.field(name, pa.binary(count * dtype.itemsize), nullable=False, metadata={DTYPE: dtype.str.encode()})


def packed_dtype(field: pa.Field) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """The numpy type of a column and the shape of one row's value in it."""
    if pa.types.is_fixed_size_binary(field.type):
        dtype = np.dtype(field.metadata[DTYPE].decode())
        return dtype, (field.type.byte_width // dtype.itemsize,)
    return np.dtype(field.type.to_pandas_dtype()).newbyteorder("<"), ()


def shard_schema(manifest: Manifest, columns: Sequence[str] | None = None) -> pa.Schema:
    """Some columns of the shards that a manifest lists, or all of them."""
    schema = text_schema(manifest.positions, manifest.outputs) if manifest.kind == "text" else digits_schema()
    return schema if columns is None else pa.schema([schema.field(name) for name in columns])


def row_bytes(schema: pa.Schema) -> int:
    """Bytes of one row of a shard."""
    return sum(field.type.bit_width // 8 for field in schema)
