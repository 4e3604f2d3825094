"""How many tokens llama.cpp is given at once, and what that takes: arithmetic that loads no library."""

from __future__ import annotations

from overproof.models.sizes import FP32_BYTES, ModelSize
from overproof.models.zero_memory import HALF_BYTES

MOST_LOGITS = 1 << 25  # numbers held at once: 128 MiB
FEWEST_TOKENS, MOST_TOKENS = 32, 512  # of a batch: below, matrices are too small to be quick; above, little is gained


def batch_tokens(positions: int, outputs: int) -> int:
    """Tokens in a batch of rows of ``positions`` tokens at most."""
    return min(positions, max(FEWEST_TOKENS, min(MOST_TOKENS, MOST_LOGITS // outputs)))


def rearranged_memory(size: ModelSize) -> int:
    """Bytes of the matrices of q4_0 (18 for 32 numbers; the tables are in q8_0), which llama.cpp lays out a second time
    for processors with AVX2 or wider, outside the mapping.
    """
    table = size.outputs * size.hidden
    return 18 * sum(numbers for numbers in size.tensors if numbers != table) // 32


def context_memory(size: ModelSize, positions: int, told: int, cache_bytes: int = HALF_BYTES) -> int:
    """Bytes of a context beside the file's mapping: keys and values, each number of which takes ``cache_bytes``, and
    twice the logits of the ``told`` places of a batch that are asked for, where they are computed and where they are
    read.
    """
    cached = 2 * positions * size.layers * size.key_width * cache_bytes
    return cached + 2 * FP32_BYTES * told * size.outputs
