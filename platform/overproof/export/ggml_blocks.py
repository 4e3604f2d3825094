"""ggml's quantised blocks: written by ggml itself, and with codes of one's own in the scales that it chose.

A row of a matrix is blocks of 32 or 256 numbers; each has its scales, and a code of a few bits for each number (the
structures of https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h). gguf's Python package writes no K types,
so the function of llama.cpp's own library does.

Shapes: R rows, C columns, N bytes of a row; in a block U columns.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Ggml
from numpy.typing import NDArray

from overproof.engines.llamacpp_logits import library

Weights = NDArray[np.float32]
Bytes = NDArray[np.uint8]
SUPER_BLOCK = 256  # numbers in a block of a K type
NARROWER = {Ggml.Q4_K: Ggml.Q5_0, Ggml.Q5_K: Ggml.Q5_1, Ggml.Q6_K: Ggml.Q8_0}  # where a row is no whole super-blocks


def quantise(weights_RC: Weights, kind: Ggml, importance_C: Weights | None = None) -> Bytes:
    """A matrix in a type, (R, N): rounded so that errors count alike, or as much as the importance of their column."""
    if kind in (Ggml.F32, Ggml.F16) or (importance_C is None and kind in (Ggml.Q4_0, Ggml.Q8_0)):
        return gguf.quants.quantize(np.ascontiguousarray(weights_RC), kind)  # type: ignore[no-any-return]
    rows, columns = weights_RC.shape
    source = np.ascontiguousarray(weights_RC, np.float32)
    important = None if importance_C is None else np.ascontiguousarray(importance_C, np.float32)
    found = np.zeros(gguf.quants.quant_shape_to_byte_shape(source.shape, kind), np.uint8)
    weighed = None if important is None else important.ctypes.data
    _quantize_chunk()(int(kind), source.ctypes.data, found.ctypes.data, 0, rows, columns, weighed)
    return found


@cache
def _quantize_chunk() -> Any:
    function = library().ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int32, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    return function


def aligned(size_bytes: int) -> int:
    """What a tensor takes in a file, where the next one begins at a multiple of 32 bytes."""
    each: int = gguf.GGUF_DEFAULT_ALIGNMENT
    return -(-size_bytes // each) * each


def dequantise(blocks_RN: Bytes, kind: Ggml) -> Weights:
    """The numbers that blocks mean, (R, C)."""
    return gguf.quants.dequantize(blocks_RN, kind).astype(np.float32, copy=False)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Blocks:
    """A type whose numbers are ``scale * code + offset``, with codes from 0 to ``most``."""

    most: int
    columns: int  # U
    grid: Callable[[Bytes], tuple[Weights, Weights]]  # scale and offset of each column, (R, U), of one block a row
    with_codes: Callable[[Bytes, Bytes], Bytes]  # the same blocks with other codes (R, U)


def _half(blocks_RN: Bytes, place: int) -> Weights:
    return np.ascontiguousarray(blocks_RN[:, place : place + 2]).view("<f2").astype(np.float32)


def _plain(middle: int, columns: int = 32) -> Callable[[Bytes], tuple[Weights, Weights]]:
    """One scale for the block, and codes that are symmetric about ``middle``."""

    def grid(blocks_RN: Bytes) -> tuple[Weights, Weights]:
        scale_RU = np.repeat(_half(blocks_RN, 0), columns, 1)
        return scale_RU, -middle * scale_RU

    return grid


def _with_least(blocks_RN: Bytes) -> tuple[Weights, Weights]:
    """A scale and the least number."""
    return np.repeat(_half(blocks_RN, 0), 32, 1), np.repeat(_half(blocks_RN, 2), 32, 1)


def _nested(blocks_RN: Bytes) -> tuple[Weights, Weights]:
    """Eight scales and offsets of six bits each, and a scale for either kind."""
    packed = blocks_RN[:, 4:16]
    low, middle, high = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scale_R8 = np.concatenate([low & 63, (high & 15) | (low >> 6 << 4)], 1)
    least_R8 = np.concatenate([middle & 63, (high >> 4) | (middle >> 6 << 4)], 1)
    scale_RU = np.repeat(_half(blocks_RN, 0) * scale_R8.astype(np.float32), 32, 1)
    return scale_RU, -np.repeat(_half(blocks_RN, 2) * least_R8.astype(np.float32), 32, 1)


def _nibbles(place: int) -> Callable[[Bytes, Bytes], Bytes]:
    """Low four bits of 32 codes: of the first half in the low half of each byte."""

    def with_codes(blocks_RN: Bytes, codes_RU: Bytes) -> Bytes:
        found, low = blocks_RN.copy(), codes_RU & 15
        found[:, place : place + 16] = low[:, :16] | low[:, 16:] << 4
        return found

    return with_codes


def _nibbles_and_bits(bits: int) -> Callable[[Bytes, Bytes], Bytes]:
    """The same behind the fifth bit of each code."""

    def with_codes(blocks_RN: Bytes, codes_RU: Bytes) -> Bytes:
        found = _nibbles(bits + 4)(blocks_RN, codes_RU)
        found[:, bits : bits + 4] = np.packbits(codes_RU >> 4, axis=1, bitorder="little")
        return found

    return with_codes


def _super_nibbles(place: int) -> Callable[[Bytes, Bytes], Bytes]:
    """Low four bits of 256 codes: 32 in the low half of as many bytes, and the next 32 in the high half."""

    def with_codes(blocks_RN: Bytes, codes_RU: Bytes) -> Bytes:
        found, low = blocks_RN.copy(), (codes_RU & 15).reshape(-1, 4, 2, 32)
        found[:, place : place + 128] = (low[:, :, 0] | low[:, :, 1] << 4).reshape(-1, 128)
        return found

    return with_codes


def _super_nibbles_and_bits(blocks_RN: Bytes, codes_RU: Bytes) -> Bytes:
    """The same behind the fifth bits: bit i of byte l is of number l of the i-th 32."""
    found = _super_nibbles(48)(blocks_RN, codes_RU)
    bits = (codes_RU >> 4).reshape(-1, 8, 32)
    found[:, 16:48] = np.packbits(bits, axis=1, bitorder="little")[:, 0]
    return found


BLOCKS: dict[Ggml, Blocks] = {
    Ggml.Q4_0: Blocks(15, 32, _plain(8), _nibbles(2)),
    Ggml.Q5_0: Blocks(31, 32, _plain(16), _nibbles_and_bits(2)),
    Ggml.Q5_1: Blocks(31, 32, _with_least, _nibbles_and_bits(4)),
    Ggml.Q4_K: Blocks(15, SUPER_BLOCK, _nested, _super_nibbles(16)),
    Ggml.Q5_K: Blocks(31, SUPER_BLOCK, _nested, _super_nibbles_and_bits),
}
