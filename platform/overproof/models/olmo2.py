"""OLMo 2 (arXiv 2501.00656): Llama with norms after attention and feed-forward, and on all queries and all keys."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from overproof.models.decoder import LLAMA_NAMES, DecoderFamily, GroupedDecoderModel, Widths
from overproof.models.gguf_layout import GgufLayout
from overproof.models.sizes import FP32_BYTES, ModelSize


class Olmo2(GroupedDecoderModel):
    """An OLMo-2-architecture language model with tied embeddings, from its configuration."""

    kind: Literal["olmo2"] = "olmo2"


class Olmo2Family(DecoderFamily):
    """See ``DecoderFamily``."""

    section = Olmo2
    architectures = ("Olmo2ForCausalLM",)
    names = replace(LLAMA_NAMES, attention_output=None, width_goes=False)  # one norm has all heads
    gguf = GgufLayout(
        architecture="olmo2", assumed={"hidden_act": "silu", "attention_bias": False}, repeats_embeddings=True
    )

    def layer_tensors(self, widths: Widths) -> tuple[int, ...]:
        return (*super().layer_tensors(widths), widths.queries, widths.keys)

    def layer_memory(self, size: ModelSize, element_bytes: int) -> int:
        """Norms keep what goes in and what it is scaled to, both in fp32."""
        normed = 2 * FP32_BYTES * (size.query_width + size.key_width + 1)
        wider = 2 * (FP32_BYTES - element_bytes) * size.hidden  # than Llama's norms, which scale in 16 bits
        return super().layer_memory(size, element_bytes) + normed + wider


FAMILY = Olmo2Family()
