"""Rotary positions (arXiv 2104.09864), scaled or not, as GGUF has them.

llama.cpp multiplies each frequency by ``rope.scaling.factor``'s inverse (linear), or divides it by a tensor: that of
Llama 3's scaling holds one divisor for each pair of rows, those of LongRoPE (arXiv 2402.13753) a short and a long one,
of which the short one applies up to the length the model was made for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

FREQUENCIES = "rope_freqs.weight"
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
Rope = Mapping[str, Any]  # rope_parameters of a Hugging Face configuration
Vector = NDArray[np.float32]


def metadata(rope: Rope, head: int, positions: int) -> dict[str, Any]:
    """By key, below the architecture's name, for heads of a width and the configuration's most positions."""
    found: dict[str, Any] = {
        "rope.dimension_count": int(head * rope.get("partial_rotary_factor", 1.0)),
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if rope["rope_type"] == "linear":
        found |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if rope["rope_type"] == "longrope":
        found |= {
            "rope.scaling.attn_factor": _attention_factor(rope, positions),
            "rope.scaling.original_context_length": int(rope["original_max_position_embeddings"]),
        }
    return found


def tensors(rope: Rope, head: int) -> dict[str, Vector]:
    """The divisors of the frequencies, by name."""
    if rope["rope_type"] == "llama3":
        return {FREQUENCIES: _llama3_divisors(rope, int(head * rope.get("partial_rotary_factor", 1.0)))}
    if rope["rope_type"] == "longrope":
        # The context ends where the long divisors would begin; llama.cpp takes them by the memory it has reserved.
        return {tensor: np.asarray(rope["short_factor"], np.float32) for tensor in (LONG, SHORT)}
    return {}


def parameters(read: Mapping[str, Any], extra: Mapping[str, Vector]) -> dict[str, Any]:
    """The inverse: rope_parameters of a Hugging Face configuration. Llama 3's divisors are told as LongRoPE's, both of
    which are then the same.
    """
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": read["rope.freq_base"]}
    share = read["rope.dimension_count"] / read["attention.key_length"]
    if share != 1:
        found["partial_rotary_factor"] = share
    if read.get("rope.scaling.type") == "linear":
        found |= {"rope_type": "linear", "factor": read["rope.scaling.factor"]}
    long, short = (extra.get(name, extra.get(FREQUENCIES)) for name in (LONG, SHORT))
    if long is not None and short is not None:
        found |= {
            "rope_type": "longrope",
            "long_factor": long.tolist(),
            "short_factor": short.tolist(),
            "attention_factor": read.get("rope.scaling.attn_factor", 1.0),
            "original_max_position_embeddings": read.get(
                "rope.scaling.original_context_length", read["context_length"]
            ),
            "factor": 1.0,
        }
    return found


def limits(rope: Rope) -> Iterator[int]:
    """Lengths past which transformers computes otherwise, by what a prompt holds, and llama.cpp by what it might."""
    if rope["rope_type"] == "longrope":
        yield int(rope["original_max_position_embeddings"])


def unfit(rope: Rope, kinds: Sequence[str], turns_part: bool = False) -> Iterator[str]:
    """What an architecture that knows these kinds of scaling, and perhaps heads turned in part, computes otherwise."""
    if rope.get("partial_rotary_factor", 1.0) != 1 and not turns_part:
        yield f"partial_rotary_factor {rope['partial_rotary_factor']}; expected 1"
    if rope["rope_type"] not in kinds:
        yield f"rope_type {rope['rope_type']!r}; expected {' or '.join(map(repr, kinds))}"


def _llama3_divisors(rope: Rope, dimensions: int) -> Vector:
    """By which each frequency is divided (Llama 3.1's technical report, arXiv 2407.21783, and its reference code): 1
    for those that turn ``high_freq_factor`` times or more in the original length, ``factor`` for those that turn
    fewer than ``low_freq_factor`` times, and in between so that the frequency itself goes over linearly.
    """
    exponents = np.arange(0, dimensions, 2, dtype=np.float32) / dimensions
    turns = rope["original_max_position_embeddings"] * float(rope["rope_theta"]) ** -exponents / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0, 1)  # 1: the frequency stays as it is
    divisors: Vector = (1 / (kept + (1 - kept) / rope["factor"])).astype(np.float32)
    return divisors


def _attention_factor(rope: Rope, positions: int) -> float:
    """By which LongRoPE scales queries and keys: as its paper has it, unless the configuration names another."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    original = rope["original_max_position_embeddings"]
    factor = rope.get("factor") or positions / original
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
