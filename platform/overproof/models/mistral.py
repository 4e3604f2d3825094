"""Mistral (arXiv 2310.06825): Llama with a sliding window, which a GGUF file leaves out and ends its context at."""

from __future__ import annotations

from typing import Any, Literal

from overproof.models.base import DataShape
from overproof.models.decoder import DecoderFamily, GroupedDecoderModel
from overproof.models.llama import LlamaFamily


class Mistral(GroupedDecoderModel):
    """A Mistral-architecture language model with tied embeddings, from its configuration; without a sliding window."""

    kind: Literal["mistral"] = "mistral"


class MistralFamily(DecoderFamily):
    """See ``DecoderFamily``. llama.cpp has it as Llama."""

    section = Mistral
    architectures = ("MistralForCausalLM",)
    gguf = LlamaFamily.gguf

    def settings(self, section: Any, shape: DataShape) -> dict[str, Any]:
        return super().settings(section, shape) | {"sliding_window": None}


FAMILY = MistralFamily()
