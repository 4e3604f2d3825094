"""Phi-3 and Phi-4 (arXiv 2404.14219, 2412.08905): Llama with fused matrices, and positions scaled by LongRoPE."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from overproof.models.base import DataShape, FusedAttention
from overproof.models.decoder import LLAMA_NAMES, DecoderFamily, GroupedDecoderModel, Widths
from overproof.models.gguf_layout import GgufContent, GgufLayout, head_width
from overproof.models.sizes import ModelSize

if TYPE_CHECKING:
    from torch import Tensor


class Phi3(GroupedDecoderModel):
    """A Phi-3-architecture language model with tied embeddings, from its configuration."""

    kind: Literal["phi3"] = "phi3"


class Phi3Layout(GgufLayout):
    """See ``GgufLayout``."""

    def settings(self, content: GgufContent) -> dict[str, Any]:
        found = super().settings(content)
        rope = found["rope_parameters"]
        original = rope.get("original_max_position_embeddings", found["max_position_embeddings"])
        del found["head_dim"]  # which the configuration has none of
        return found | {"original_max_position_embeddings": original}

    def unfit(self, config: Any) -> Iterator[str]:
        yield from super().unfit(config)
        if head_width(config) * config.num_attention_heads != config.hidden_size:
            yield f"head_dim {head_width(config)}; expected hidden_size over num_attention_heads"


def _split(config: Any, fused_BPD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    keys = head_width(config) * config.num_key_value_heads
    return fused_BPD[..., : -2 * keys], fused_BPD[..., -2 * keys : -keys], fused_BPD[..., -keys:]


class Phi3Family(DecoderFamily):
    """See ``DecoderFamily``."""

    section = Phi3
    architectures = ("Phi3ForCausalLM",)
    names = replace(
        LLAMA_NAMES,
        attention_output=None,
        width_goes=False,
        feed_forward=("mlp.gate_up_proj", "mlp.down_proj"),
        queries=None,
        keys=None,
        values=None,
        fused=FusedAttention("self_attn.qkv_proj", _split),
    )
    gguf = Phi3Layout(
        architecture="phi3", assumed={"hidden_act": "silu"}, scalings=("default", "longrope"), turns_part=True
    )

    def settings(self, section: Any, shape: DataShape) -> dict[str, Any]:
        found = super().settings(section, shape)
        return found | {"original_max_position_embeddings": found["max_position_embeddings"]}

    def layer_tensors(self, widths: Widths) -> tuple[int, ...]:
        h, f, q, k = widths.hidden, widths.intermediate, widths.queries, widths.keys
        return ((q + 2 * k) * h, h * q, 2 * f * h, h * f, h, h)  # qkv o, gate and up, down, two norms

    def mask_numbers(self, widths: Widths, shape: DataShape) -> int:
        """Keys and values that are repeated are kept in place of those that lie with the queries."""
        del widths
        return shape.positions

    def layer_memory(self, size: ModelSize, element_bytes: int) -> int:
        """The values are kept with the queries and keys that they were computed with, and the queries once more."""
        together = element_bytes * (2 * size.query_width + size.key_width)
        return super().layer_memory(size, element_bytes) + together


FAMILY = Phi3Family()
