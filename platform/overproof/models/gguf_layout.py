"""How llama.cpp has a family of decoders: what a GGUF file says of its shape, and which tensors it stores otherwise.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Both directions stand side by side, so that what a
file means is the inverse of what was written. A figure that a family's configuration has goes into ``counts`` or
``reals``; one that llama.cpp computes with whatever a file says goes into ``assumed``, and another value is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from overproof.models import gguf_rope

Weights = NDArray[np.float32]
SHAPE = {
    "vocab_size": "vocab_size",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}
BIASES = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"}
RMS_NORM = {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}


@dataclass(frozen=True)
class Change:
    """How llama.cpp stores a tensor otherwise than Hugging Face. Both are functions of weights and configuration."""

    to_gguf: Callable[[Weights, Any], Weights]
    from_gguf: Callable[[Weights, Any], Weights]
    transposes: bool = False


def interleave_rotary(weights: Weights, heads: int) -> Weights:
    """Rows of a query or key matrix from Hugging Face's order to that of some of llama.cpp's architectures.

    Rotary embedding (arXiv 2104.09864) turns pairs of rows; the first keeps a head's pairs as two halves, the
    second keeps them side by side.
    """
    rows, *columns = weights.shape
    return weights.reshape(heads, 2, rows // heads // 2, *columns).swapaxes(1, 2).reshape(weights.shape)


def split_rotary(weights: Weights, heads: int) -> Weights:
    """The inverse of ``interleave_rotary``."""
    rows, *columns = weights.shape
    return weights.reshape(heads, rows // heads // 2, 2, *columns).swapaxes(1, 2).reshape(weights.shape)


QUERIES_INTERLEAVED = Change(
    lambda weights, config: interleave_rotary(weights, config.num_attention_heads),
    lambda weights, config: split_rotary(weights, config.num_attention_heads),
)
KEYS_INTERLEAVED = Change(
    lambda weights, config: interleave_rotary(weights, config.num_key_value_heads),
    lambda weights, config: split_rotary(weights, config.num_key_value_heads),
)
INTERLEAVED = {
    f"{name}.{part}": change
    for name, change in (("q_proj", QUERIES_INTERLEAVED), ("k_proj", KEYS_INTERLEAVED))
    for part in ("weight", "bias")
}
TRANSPOSED = Change(lambda weights, _: weights.T, lambda weights, _: weights.T, transposes=True)
PLUS_ONE = Change(lambda weights, _: weights + np.float32(1), lambda weights, _: weights - np.float32(1))


@dataclass(frozen=True)
class GgufContent:
    """What a file says of its model's shape."""

    metadata: Mapping[str, Any]  # by key, below the architecture's name
    tensors: frozenset[str]  # names of those that are the model's own
    rope: Mapping[str, Weights]  # the others, by name


@dataclass(frozen=True)
class GgufLayout:
    """One architecture of llama.cpp. Keys are those of a file's metadata, below the architecture's name."""

    architecture: str
    counts: Mapping[str, str] = field(default_factory=lambda: SHAPE)  # by key, the configuration's name of an integer
    reals: Mapping[str, str] = field(default_factory=lambda: RMS_NORM)  # the same of a number; None is left out
    assumed: Mapping[str, Any] = field(default_factory=dict)  # by the configuration's name, the one value that fits
    optional: Mapping[str, str] = field(default_factory=dict)  # by the configuration's name, a tensor that it brings
    changes: Mapping[str, Change] = field(default_factory=dict)  # by the end of a tensor's name in Hugging Face
    slides: bool = False  # whether the architecture knows sliding windows
    scalings: tuple[str, ...] = ("default", "linear")  # of rotary positions that the architecture knows
    repeats_embeddings: bool = False  # whether a tied output is written as if it were another tensor
    turns_part: bool = False  # whether rotary positions may turn a part of a head alone

    def metadata(self, config: Any) -> dict[str, Any]:
        """Integers, floats and strings by key, of a Hugging Face configuration."""
        counts = {key: int(getattr(config, name)) for key, name in self.counts.items()}
        found = {key: getattr(config, name) for key, name in self.reals.items()}
        reals = {key: float(value) for key, value in found.items() if value is not None}
        head = head_width(config)
        widths = {"attention.key_length": head, "attention.value_length": head}
        return {**counts, **reals, **widths, "context_length": self.context_length(config), **self.rope(config)}

    def settings(self, content: GgufContent) -> dict[str, Any]:
        """The Hugging Face settings that a file means: the inverse of ``metadata`` and ``extra_tensors``."""
        return {
            **self.figures(content),
            "head_dim": content.metadata["attention.key_length"],
            "max_position_embeddings": content.metadata["context_length"],
            "rope_parameters": gguf_rope.parameters(content.metadata, content.rope),
        }

    def figures(self, content: GgufContent) -> dict[str, Any]:
        """Those that ``counts``, ``reals``, ``optional`` and ``assumed`` name."""
        found = {name: content.metadata.get(key) for key, name in {**self.counts, **self.reals}.items()}
        there = {name: tensor in content.tensors for name, tensor in self.optional.items()}
        return {**self.assumed, **found, **there}

    def rope(self, config: Any) -> dict[str, Any]:
        """What ``metadata`` says of rotary positions."""
        return gguf_rope.metadata(config.rope_parameters, head_width(config), config.max_position_embeddings)

    def extra_tensors(self, config: Any) -> dict[str, Weights]:
        """Tensors, by their names in the file, that Hugging Face computes from its configuration."""
        return gguf_rope.tensors(config.rope_parameters, head_width(config))

    def context_length(self, config: Any) -> int:
        """Tokens up to which llama.cpp computes what transformers does: an architecture without sliding windows attends
        to everything, and scaled rotary positions may differ past the length they were scaled from.
        """
        limits = [int(config.max_position_embeddings), *gguf_rope.limits(config.rope_parameters)]
        known = config.to_dict()
        window, kinds = known.get("sliding_window"), known.get("layer_types")
        if not self.slides and window and (kinds is None or "sliding_attention" in kinds):
            limits.append(int(window))
        return min(limits)

    def unfit(self, config: Any) -> Iterator[str]:
        """What of a configuration llama.cpp would compute otherwise: what was found, and what was expected."""
        known = config.to_dict()
        for name, value in self.assumed.items():
            if (known.get(name, value) or None) != (value or None):  # null and false both switch a feature off
                yield f"{name} {known[name]!r}; expected {value!r}"
        yield from self.rope_unfit(config)

    def rope_unfit(self, config: Any) -> Iterator[str]:
        """The same of rotary positions."""
        yield from gguf_rope.unfit(config.rope_parameters, self.scalings, self.turns_part)

    def change(self, tensor: str) -> Change | None:
        """How a tensor, by its name in Hugging Face, is stored otherwise; None where it is not."""
        return next((change for end, change in self.changes.items() if tensor.endswith(end)), None)


def head_width(config: Any) -> int:
    """Numbers in one head's query."""
    return int(config.to_dict().get("head_dim") or config.hidden_size // config.num_attention_heads)
