"""The flat columns of a cache row: what goes in comes out, in the bytes that were planned."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overproof.config import Dense, Sampled, Scheme, TopK
from overproof.data.parquet_writer import to_table
from overproof.distill.target_codec import TargetLayout, pack, packed_bytes, unpack


@given(st.integers(1, 31).filter(lambda bits: bits != 16), st.integers(1, 5), st.integers(1, 40), st.integers(0, 2**31))
@settings(max_examples=200)
def test_packed_numbers_come_back_from_as_many_bits(bits: int, rows: int, count: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 1 << bits, (rows, count))
    values[:, :1] = (1 << bits) - 1
    packed = pack(values, bits)
    assert packed.shape == (rows, packed_bytes(count, bits))
    assert packed_bytes(count, bits) == (
        2 * count + -(-count * (bits - 16) // 8) if bits > 16 else -(-count * bits // 8)
    )
    np.testing.assert_array_equal(unpack(packed, count, bits), values)


def test_the_bits_lie_where_the_documentation_says() -> None:
    low, high = 0x1234, 0xABCD
    packed = pack(np.array([[low | 1 << 16, high | 2 << 16, low | 3 << 16]]), 18)
    assert packed.tolist() == [[0x34, 0x12, 0xCD, 0xAB, 0x34, 0x12, 0b111001]]


@pytest.mark.parametrize("value", [-1, 1 << 17])
def test_numbers_that_do_not_fit_are_refused(value: int) -> None:
    with pytest.raises(ValueError, match=r"expected 0 to 131071"):
        pack(np.array([[0, value]]), 17)


@pytest.mark.parametrize(
    ("outputs", "bits"), [(10, 4), (2048, 11), (1 << 16, 16), ((1 << 16) + 1, 17), (1 << 17, 17), (151_936, 18)]
)
@pytest.mark.parametrize("scheme", [TopK(k=5), Sampled(k=3, draws=5), Dense()])
@pytest.mark.parametrize("label", ["tokens", "label"])
def test_columns_come_back_as_they_were_given(outputs: int, bits: int, scheme: Scheme, label: str) -> None:
    rows, positions, temperatures = 2, 11, 3
    layout = TargetLayout(scheme, label, positions, outputs, temperatures)
    rng = np.random.default_rng(outputs)
    places = (rows, positions)
    slots = layout.slots if not isinstance(scheme, Dense) else outputs
    given = {
        "sample_id": np.array([3, 1]),
        "mask": rng.random(places) < 0.5,
        "label_logprob": rng.normal(size=places).astype(np.float16).astype(np.float32),
        "logsumexp": rng.normal(size=(*places, temperatures - 1)).astype(np.float32),
        "logprobs": rng.normal(size=(*places, slots)).astype(np.float16).astype(np.float32),
    }
    tokens = rng.integers(0, outputs, (rows, positions + 1))
    given[label] = tokens if label == "tokens" else tokens[:, 1:]  # one of each prediction
    if not isinstance(scheme, Dense):
        given["indices"] = rng.integers(0, outputs, (*places, slots))
        given["indices"][0, 0, 0] = outputs - 1
        given["tail"] = np.full(places, -np.inf, np.float32)
    if isinstance(scheme, Sampled):
        given["drawn"] = rng.integers(0, outputs, (*places, scheme.draws))
        for name, last in {"drawn_logprobs": scheme.draws, "entropy": temperatures}.items():
            given[name] = rng.normal(size=(*places, last)).astype(np.float16).astype(np.float32)
    assert layout.bits == bits
    table = to_table(layout.encode(given), layout.schema)
    assert table.nbytes == rows * layout.row_bytes
    for name in set(given) - {"sample_id"}:
        kind = np.dtype(table.schema.field(name).metadata[b"dtype"].decode())
        stored = np.frombuffer(b"".join(table.column(name).to_pylist()), kind).reshape(rows, -1)
        np.testing.assert_array_equal(layout.decode(name, stored), given[name])


def test_narrow_indices_take_as_many_bits_as_they_need() -> None:
    by_outputs = {v: TargetLayout(TopK(k=32), "tokens", 128, v, 1).schema.field("indices").type.byte_width for v in
                  (1 << 16, 1 << 17, 1 << 18)}  # fmt: skip
    assert {v: width * 8 / (128 * 32) for v, width in by_outputs.items()} == {1 << 16: 16, 1 << 17: 17, 1 << 18: 18}
