"""How targets are stored: a cached row's columns for each scheme, and indices packed to as many bits as they need.

Shapes: B rows, N numbers in a row, P predictions in a row, V outputs, K kept for each prediction, D drawn,
L temperatures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from overproof.config import Dense, Sampled, Scheme, TopK
from overproof.data.columns import UINT16_VOCABULARY, packed_field
from overproof.data.parquet_reader import Columns

LOW_BITS = 16
EIGHT = 8  # numbers of any width fill whole bytes; of less than 16 bits each, no more than two words
WORD_BITS = 64
TOKENS = "tokens"  # the label column of sequences
INDEX_COLUMNS = {"indices", "drawn"}
FLOAT16_COLUMNS = {"logprobs", "label_logprob", "tail", "drawn_logprobs", "entropy"}


@dataclass(frozen=True)
class TargetLayout:
    """The columns of a cache, which follow from what is kept for each prediction.

    Every column is flat and of one width, so that a row's place in the file is arithmetic:

    ==============  ==========  =====  ======================================================================
    column          numbers     a row  what
    ==============  ==========  =====  ======================================================================
    sample_id       int64       1      of the train row
    tokens          u2, u4      P + 1  of sequences: the row as the teacher read it
    label           u2, u4      P      of other rows: the class, or whether each label is there
    mask            bits        P      whether a prediction counts; bytes filled from the lowest bit
    label_logprob   f2          P      of the token that follows, or of the class
    logsumexp       f4          P * .  of log-probabilities / T over all V outputs, for every temperature T but 1,
                                       where it is 0: so many for each prediction as there are others
    logprobs        f2          P * K  natural, at temperature 1; the largest come first, or all V in their order
    indices         u2, packed  P * K  topk, sampled: which outputs they are of; see ``pack``
    tail            f2          P      topk, sampled: log of the mass that is in none of the K, -inf for none; of
                                       sampled in the mean of the distributions at the L temperatures
    drawn           u2, packed  P * D  sampled: outputs drawn from that mass, each for 1 / D of it
    drawn_logprobs  f2          P * D  sampled, where L is not 1: as logprobs
    entropy         f2          P * L  sampled: of the teacher at every temperature, nats
    ==============  ==========  =====  ======================================================================
    """

    scheme: Scheme
    label_column: (
        str  # of the data: tokens, each of which is the label of those before it, or the predictions' own labels
    )
    positions: int
    outputs: int
    temperatures: int

    @property
    def labels(self) -> int:
        """Numbers a row in the label column."""
        return self.positions + (self.label_column == TOKENS)

    @property
    def slots(self) -> int:
        """K: V where the scheme is dense."""
        match self.scheme:
            case TopK(k=slots) | Sampled(k=slots):
                return slots
            case Dense():
                return self.outputs

    @property
    def draws(self) -> int:
        """D."""
        return self.scheme.draws if isinstance(self.scheme, Sampled) else 0

    @property
    def bits(self) -> int:
        """Of an index: what V needs."""
        return max(1, (self.outputs - 1).bit_length())

    @property
    def columns(self) -> dict[str, tuple[np.dtype[Any], int]]:
        """Which numbers each column holds, and how many a row, `sample_id` left out."""
        entries, drawn = self.positions * self.slots, self.positions * self.draws
        output = "<u2" if self.outputs <= UINT16_VOCABULARY else "<u4"
        columns = {self.label_column: (output, self.labels)}
        columns |= {
            "mask": ("u1", -(-self.positions // 8)),
            "label_logprob": ("<f2", self.positions),
            "logprobs": ("<f2", entries),
        }
        if self.temperatures > 1:
            columns["logsumexp"] = ("<f4", self.positions * (self.temperatures - 1))
        if not isinstance(self.scheme, Dense):
            columns |= {"indices": self._indices(entries), "tail": ("<f2", self.positions)}
        if isinstance(self.scheme, Sampled):
            columns |= {"drawn": self._indices(drawn), "entropy": ("<f2", self.positions * self.temperatures)}
            if self.temperatures > 1:
                columns["drawn_logprobs"] = ("<f2", drawn)
        return {name: (np.dtype(kind), count) for name, (kind, count) in columns.items()}

    def _indices(self, count: int) -> tuple[str, int]:
        return ("u1", packed_bytes(count, self.bits)) if self.bits != LOW_BITS else ("<u2", count)

    @property
    def schema(self) -> pa.Schema:
        """The columns of a file; none may be null."""
        fields = [packed_field(name, kind, count) for name, (kind, count) in self.columns.items()]
        return pa.schema([pa.field("sample_id", pa.int64(), nullable=False), *fields])

    @property
    def loss_columns(self) -> tuple[str, ...]:
        """Those a student learns from."""
        drawn = ("indices", "tail", "drawn", "entropy")
        names = ("logprobs", *{TopK: ("indices",), Sampled: drawn, Dense: ()}[type(self.scheme)])
        return names + tuple(name for name in ("logsumexp", "drawn_logprobs") if name in self.columns)

    @property
    def column_bytes(self) -> dict[str, int]:
        """Of a row in each column."""
        return {"sample_id": 8} | {name: kind.itemsize * count for name, (kind, count) in self.columns.items()}

    @property
    def row_bytes(self) -> int:
        return sum(self.column_bytes.values())

    def encode(self, values: Columns) -> Columns:
        """Arrays of any shape (B, ...) as the flat columns of a file; a mask is bool, indices are integers."""
        flat = {name: array.reshape(len(array), -1) for name, array in values.items()}
        flat["mask"] = np.packbits(flat["mask"], axis=1, bitorder="little")
        for name in INDEX_COLUMNS & flat.keys() if self.bits != LOW_BITS else ():
            flat[name] = pack(flat[name], self.bits)
        for name in FLOAT16_COLUMNS & flat.keys():
            flat[name] = flat[name].astype(np.float16)
        return {name: array[:, 0] if name == "sample_id" else array for name, array in flat.items()}

    def decode(self, name: str, values: NDArray[Any]) -> NDArray[Any]:
        """A column of a file as (B, P), (B, P, K, D or L) or, of tokens, (B, P + 1); floats are float32."""
        if name == "mask":
            return np.unpackbits(values, axis=1, count=self.positions, bitorder="little").astype(bool)
        last = {"logprobs": self.slots, "indices": self.slots, "drawn": self.draws, "drawn_logprobs": self.draws,
                "logsumexp": self.temperatures - 1, "entropy": self.temperatures}  # fmt: skip
        if name in INDEX_COLUMNS and self.bits != LOW_BITS:
            values = unpack(values, self.positions * last[name], self.bits)
        if name in last:
            values = values.reshape(len(values), self.positions, last[name])
        return values.astype(np.float32, copy=False) if values.dtype.kind == "f" else values


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of so many numbers as ``pack`` lays them out."""
    low = LOW_BITS if bits > LOW_BITS else 0
    return count * low // 8 + -(-count * (bits - low) // 8)


def pack(values_BN: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """Numbers below ``2 ** bits``, of 1 to 31 bits, as bytes: the low 16 bits of each, then the other bits of each.

    Of fewer than 16 bits there are the other bits alone. Little-endian, and bytes are filled from the lowest bit. The
    16 bits are read as they lie; a bit or two of each number is all that must be taken apart for a large vocabulary.

    Raises:
        ValueError: a number does not fit.
    """
    if values_BN.size and not 0 <= values_BN.min() <= values_BN.max() < 1 << bits:
        raise ValueError(f"numbers from {values_BN.min()} to {values_BN.max()}; expected 0 to {(1 << bits) - 1}")
    if bits <= LOW_BITS:
        return _pack_bits(values_BN, bits)
    low_BN = np.ascontiguousarray(values_BN & 0xFFFF, "<u2")
    return np.concatenate([low_BN.view(np.uint8), _pack_bits(values_BN >> LOW_BITS, bits - LOW_BITS)], axis=1)


def unpack(packed: NDArray[np.uint8], count: int, bits: int) -> NDArray[np.int64]:
    """The ``count`` numbers of each row that ``pack`` packed: (B, N)."""
    if bits <= LOW_BITS:
        return _unpack_bits(packed, count, bits)
    values_BN = _unpack_bits(packed[:, 2 * count :], count, bits - LOW_BITS) << LOW_BITS
    values_BN |= np.ascontiguousarray(packed[:, : 2 * count]).view("<u2")
    return values_BN


def _pack_bits(values_BN: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """One number after the other, eight at a time: G eights of a row, each in two words of which ``bits`` bytes are
    kept. Every operation is on one number of all eights at once.
    """
    if bits == 1:
        return np.packbits(values_BN.astype(np.uint8), axis=1, bitorder="little")
    rows, count = values_BN.shape
    eights = -(-count // EIGHT)
    values_BG8 = np.zeros((rows, eights * EIGHT), "<u8")
    values_BG8[:, :count] = values_BN
    values_BG8 = values_BG8.reshape(rows, eights, EIGHT)
    words_2BG = np.zeros((2, rows, eights), "<u8")
    for number in range(EIGHT):
        word, shift = divmod(number * bits, WORD_BITS)
        words_2BG[word] |= values_BG8[..., number] << shift
        if shift + bits > WORD_BITS:
            words_2BG[1] |= values_BG8[..., number] >> WORD_BITS - shift
    kept = np.stack(list(words_2BG), axis=-1).view(np.uint8)[..., :bits]
    return kept.reshape(rows, -1)[:, : -(-count * bits // EIGHT)]


def _unpack_bits(packed: NDArray[np.uint8], count: int, bits: int) -> NDArray[np.int64]:
    """What ``_pack_bits`` packed."""
    rows, eights = len(packed), -(-count // EIGHT)
    bytes_BGH = np.zeros((rows, eights * bits), np.uint8)
    bytes_BGH[:, : packed.shape[1]] = packed
    words_BGH = np.zeros((rows, eights, 2 * WORD_BITS // EIGHT), np.uint8)
    words_BGH[..., :bits] = bytes_BGH.reshape(rows, eights, bits)
    low_BG, high_BG = np.moveaxis(words_BGH.view("<u8"), -1, 0)
    values_BG8 = np.empty((rows, eights, EIGHT), np.int64)
    for number in range(EIGHT):
        word, shift = divmod(number * bits, WORD_BITS)
        value_BG = (high_BG if word else low_BG) >> shift
        if shift + bits > WORD_BITS:
            value_BG |= high_BG << WORD_BITS - shift
        values_BG8[..., number] = value_BG & (1 << bits) - 1
    values_BN: NDArray[np.int64] = values_BG8.reshape(rows, -1)[:, :count]
    return values_BN
