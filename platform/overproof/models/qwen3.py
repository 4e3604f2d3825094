"""Qwen3 (arXiv 2505.09388): Llama with a norm on each head's query and key."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from overproof.models.base import DataShape
from overproof.models.decoder import LLAMA_NAMES, DecoderFamily, GroupedDecoderModel, Widths
from overproof.models.gguf_layout import GgufLayout
from overproof.models.sizes import FP32_BYTES, ModelSize


class Qwen3(GroupedDecoderModel):
    """A Qwen3-architecture language model with tied embeddings, from its configuration."""

    kind: Literal["qwen3"] = "qwen3"


class Qwen3Family(DecoderFamily):
    """See ``DecoderFamily``."""

    section = Qwen3
    architectures = ("Qwen3ForCausalLM",)
    names = replace(LLAMA_NAMES, per_layer=("layer_types",))
    gguf = GgufLayout(architecture="qwen3", assumed={"hidden_act": "silu", "attention_bias": False})

    def settings(self, section: Any, shape: DataShape) -> dict[str, Any]:
        return super().settings(section, shape) | {"head_dim": section.hidden_size // section.heads}

    def layer_tensors(self, widths: Widths) -> tuple[int, ...]:
        return (*super().layer_tensors(widths), widths.head, widths.head)

    def layer_memory(self, size: ModelSize, element_bytes: int) -> int:
        return super().layer_memory(size, element_bytes) + normed_heads_memory(size, element_bytes)


def normed_heads_memory(size: ModelSize, scaled_bytes: int) -> int:
    """Bytes that norms on each head's query and key keep for one place: what goes in, in fp32, and what it is scaled
    to, each number of which takes ``scaled_bytes``.
    """
    numbers = size.query_width + size.key_width
    heads = size.heads + size.heads * size.key_width // size.query_width
    return numbers * (FP32_BYTES + scaled_bytes) + FP32_BYTES * heads


FAMILY = Qwen3Family()
