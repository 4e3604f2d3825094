"""Llama 1 to 3 (arXiv 2302.13971, 2407.21783), SmolLM and SmolLM2, and whatever else calls itself Llama."""

from __future__ import annotations

from typing import Literal

from overproof.models.decoder import DecoderFamily, GroupedDecoderModel
from overproof.models.gguf_layout import BIASES, INTERLEAVED, GgufLayout


class Llama(GroupedDecoderModel):
    """A Llama-architecture language model with tied embeddings, from its configuration."""

    kind: Literal["llama"] = "llama"


class LlamaFamily(DecoderFamily):
    """See ``DecoderFamily``."""

    section = Llama
    architectures = ("LlamaForCausalLM",)
    gguf = GgufLayout(
        architecture="llama",
        changes=INTERLEAVED,
        assumed={"hidden_act": "silu"},
        optional=BIASES,
        scalings=("default", "linear", "llama3"),
    )


FAMILY = LlamaFamily()
