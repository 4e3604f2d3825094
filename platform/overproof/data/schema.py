"""The columns of a prepared shard, as Parquet and Arrow hold them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from overproof.data.manifest import Manifest

DTYPE = b"dtype"  # in a field's metadata: the numpy type of the numbers whose bytes a row holds
UINT16_VOCABULARY = 1 << 16


def text_schema(sequence_length: int, vocab_size: int) -> pa.Schema:
    """The columns of a text shard; none may be null.

    A row's sequence_length + 1 tokens are the bytes of little-endian unsigned numbers, two bytes each where the
    vocabulary allows it, since Parquet reads bytes several times faster than lists. The field says which numbers.
    """
    stored = np.dtype("<u2" if vocab_size <= UINT16_VOCABULARY else "<u4")
    tokens = pa.binary((sequence_length + 1) * stored.itemsize)
    return pa.schema(
        [
            pa.field("sample_id", pa.int64(), nullable=False),
            pa.field("document", pa.int32(), nullable=False),
            pa.field("tokens", tokens, nullable=False, metadata={DTYPE: stored.str.encode()}),
            pa.field("length", pa.int32(), nullable=False),
        ]
    )


def digits_schema() -> pa.Schema:
    """The columns of a shard of images; none may be null."""
    types = {"sample_id": pa.int64(), "pixels": pa.list_(pa.float32(), 64), "label": pa.int32()}
    return pa.schema([pa.field(name, type_, nullable=False) for name, type_ in types.items()])


def schema(manifest: Manifest, columns: Sequence[str] | None = None) -> pa.Schema:
    """Some columns of the shards that a manifest lists, or all of them."""
    whole = text_schema(manifest.positions, manifest.outputs) if manifest.kind == "text" else digits_schema()
    return whole if columns is None else pa.schema([whole.field(name) for name in columns])


def row_bytes(fields: pa.Schema) -> int:
    """Bytes of one row in memory, before ``to_numpy``."""
    types = [field.type for field in fields]
    return sum(
        t.list_size * t.value_type.bit_width // 8 if pa.types.is_fixed_size_list(t) else t.bit_width // 8 for t in types
    )
