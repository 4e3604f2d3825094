"""Qwen2 and Qwen2.5 (arXiv 2407.10671): Llama whose queries, keys and values have biases."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from overproof.models.decoder import LLAMA_NAMES, DecoderFamily, GroupedDecoderModel, Widths
from overproof.models.gguf_layout import GgufLayout


class Qwen2(GroupedDecoderModel):
    """A Qwen2-architecture language model with tied embeddings, from its configuration."""

    kind: Literal["qwen2"] = "qwen2"


class Qwen2Family(DecoderFamily):
    """See ``DecoderFamily``."""

    section = Qwen2
    architectures = ("Qwen2ForCausalLM",)
    # llama.cpp takes its queries to be as wide as the model.
    names = replace(LLAMA_NAMES, per_layer=("layer_types",), attention_output=None, width_goes=False)
    gguf = GgufLayout(architecture="qwen2", assumed={"hidden_act": "silu"})

    def layer_tensors(self, widths: Widths) -> tuple[int, ...]:
        return (*super().layer_tensors(widths), widths.queries, widths.keys, widths.keys)


FAMILY = Qwen2Family()
