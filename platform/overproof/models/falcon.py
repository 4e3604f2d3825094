"""Falcon (arXiv 2311.16867): attention and feed-forward side by side, queries grouped with their key and value."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from overproof.models.base import DataShape, FusedAttention, LayerNames
from overproof.models.decoder import DecoderFamily, GroupedDecoderModel, Widths
from overproof.models.gguf_layout import SHAPE, Change, GgufContent, GgufLayout, Weights
from overproof.models.sizes import FP32_BYTES, ModelSize

if TYPE_CHECKING:
    from torch import Tensor

SECOND_NORM = "blk.0.attn_norm_2.weight"
COUNTS = {key: name for key, name in SHAPE.items() if not key.endswith("_kv")} | {
    "feed_forward_length": "ffn_hidden_size"
}


class Falcon(GroupedDecoderModel):
    """A Falcon-architecture language model with tied embeddings, from its configuration; as Falcon-40B has it."""

    kind: Literal["falcon"] = "falcon"


def ungroup(weights: Weights, heads: int, key_heads: int) -> Weights:
    """Rows of the fused matrix from Hugging Face's order, a group of queries, its key, its value, the next group, to
    llama.cpp's: all queries, all keys, all values.
    """
    rows, columns = weights.shape
    groups = weights.reshape(key_heads, heads // key_heads + 2, -1, columns)
    parts = (groups[:, :-2], groups[:, -2], groups[:, -1])
    return np.concatenate([part.reshape(-1, columns) for part in parts]).reshape(rows, columns)


def group(weights: Weights, heads: int, key_heads: int) -> Weights:
    """The inverse of ``ungroup``."""
    rows, columns = weights.shape
    head = rows // (heads + 2 * key_heads)
    queries, keys, values = np.split(weights, [heads * head, (heads + key_heads) * head])
    parts = (
        queries.reshape(key_heads, -1, head, columns),
        keys.reshape(key_heads, 1, head, columns),
        values.reshape(key_heads, 1, head, columns),
    )
    return np.concatenate(parts, axis=1).reshape(rows, columns)


def key_heads_of(config: Mapping[str, Any]) -> int:
    """Key and value heads: how many a configuration names counts in the newer architecture alone."""
    heads = int(config["num_attention_heads"])
    if config.get("new_decoder_architecture"):
        return int(config.get("num_kv_heads") or heads)
    return 1 if config.get("multi_query", True) else heads


UNGROUPED = Change(
    lambda weights, config: ungroup(weights, config.num_attention_heads, key_heads_of(config.to_dict())),
    lambda weights, config: group(weights, config.num_attention_heads, key_heads_of(config.to_dict())),
)


class FalconLayout(GgufLayout):
    """See ``GgufLayout``. A file is read as of the newer architecture, which has the older ones as special cases."""

    def metadata(self, config: Any) -> dict[str, Any]:
        return super().metadata(config) | {"attention.head_count_kv": key_heads_of(config.to_dict())}

    def settings(self, content: GgufContent) -> dict[str, Any]:
        found = super().settings(content)
        del found["head_dim"]  # which the configuration has none of
        return found | {
            "num_kv_heads": content.metadata["attention.head_count_kv"],
            "new_decoder_architecture": True,
            "num_ln_in_parallel_attn": 2 if SECOND_NORM in content.tensors else 1,
        }

    def unfit(self, config: Any) -> Iterator[str]:
        yield from super().unfit(config)
        if not config.new_decoder_architecture and not config.parallel_attn:
            yield "parallel_attn False; expected True"


def _split(config: Any, fused_BPD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    heads, key_heads = config.num_attention_heads, key_heads_of(config.to_dict())
    groups = fused_BPD.view(*fused_BPD.shape[:-1], key_heads, heads // key_heads + 2, -1)
    return groups[..., :-2, :].flatten(-3), groups[..., -2, :].flatten(-2), groups[..., -1, :].flatten(-2)


class FalconFamily(DecoderFamily):
    """See ``DecoderFamily``."""

    section = Falcon
    architectures = ("FalconForCausalLM",)
    names = LayerNames(
        layers="transformer.h",
        embeddings="transformer.word_embeddings",
        output="lm_head",
        feed_forward=("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        fused=FusedAttention("self_attention.query_key_value", _split),
        intermediate="ffn_hidden_size",
    )
    varlen = False  # transformers has its attention in the model's own class
    tied = True
    gguf = FalconLayout(
        architecture="falcon",
        counts=COUNTS,
        reals={"attention.layer_norm_epsilon": "layer_norm_epsilon"},
        changes={"query_key_value.weight": UNGROUPED},
        assumed={"alibi": False, "bias": False, "activation": "gelu"},
    )

    def settings(self, section: Any, shape: DataShape) -> dict[str, Any]:
        found = super().settings(section, shape)
        del found["intermediate_size"], found["num_key_value_heads"]
        return found | {
            "ffn_hidden_size": section.intermediate_size,
            "num_kv_heads": section.key_heads,
            "new_decoder_architecture": True,
        }

    def layer_tensors(self, widths: Widths) -> tuple[int, ...]:
        h, f, q, k = widths.hidden, widths.intermediate, widths.queries, widths.keys
        return ((q + 2 * k) * h, h * q, f * h, h * f, h, h, h, h)  # qkv, out, up, down, two norms

    def outer_tensors(self, widths: Widths, shape: DataShape) -> tuple[int, ...]:
        del shape
        return (widths.hidden, widths.hidden)  # the last norm

    def directory_widths(self, config: Mapping[str, Any]) -> Widths:
        h, layers, heads = (int(config[key]) for key in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
        f = int(config.get("ffn_hidden_size") or 4 * h)
        return Widths(h, f, layers, heads, key_heads_of(config), h // heads)

    def layer_memory(self, size: ModelSize, element_bytes: int) -> int:
        """Both norms have one input; keys and values are kept once for each query head, or less."""
        kept = element_bytes * (3 * size.hidden + 4 * size.query_width + 2 * size.intermediate)
        return kept + FP32_BYTES * size.heads + 4 * element_bytes

    def mask_numbers(self, widths: Widths, shape: DataShape) -> int:
        """It shares the mask between layers, and repeats nothing."""
        del widths, shape
        return 0

    def outer_memory(self, size: ModelSize, element_bytes: int) -> int:
        return 2 * element_bytes * size.hidden


FAMILY = FalconFamily()
