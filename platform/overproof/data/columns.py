"""Columns of many numbers a row, as Parquet and Arrow hold them: bytes of one width, so that places are arithmetic."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pyarrow as pa

DTYPE, SHAPE = b"dtype", b"shape"  # in a field's metadata: which numbers a row's bytes hold, and how they are laid out
UINT16_VOCABULARY = 1 << 16


def token_dtype(vocab_size: int) -> str:
    """Two bytes for a token where the vocabulary allows it."""
    return "<u2" if vocab_size <= UINT16_VOCABULARY else "<u4"


def packed_field(name: str, dtype: np.dtype[Any], shape: int | tuple[int, ...]) -> pa.Field:
    """A column of many numbers a row, as their bytes: every value has one width, so its offset is arithmetic.

    The field's metadata has their type and shape.
    """
    sizes = (shape,) if isinstance(shape, int) else shape
    metadata = {DTYPE: dtype.str.encode(), SHAPE: json.dumps(sizes).encode()}
    return pa.field(name, pa.binary(math.prod(sizes) * dtype.itemsize), nullable=False, metadata=metadata)


def packed_dtype(field: pa.Field) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """The numpy type of a column and the shape of one row's value in it."""
    if pa.types.is_fixed_size_binary(field.type):
        return np.dtype(field.metadata[DTYPE].decode()), tuple(json.loads(field.metadata[SHAPE]))
    return np.dtype(field.type.to_pandas_dtype()).newbyteorder("<"), ()


def row_bytes(schema: pa.Schema) -> int:
    """Bytes of one row of a shard."""
    return sum(field.type.bit_width // 8 for field in schema)
