"""SmolLM3 (Hugging Face): Llama, every fourth layer of which has no positions (arXiv 2501.18795)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

from overproof.models.decoder import LLAMA_NAMES, DecoderFamily, GroupedDecoderModel
from overproof.models.gguf_layout import INTERLEAVED, GgufLayout

UNTURNED_EVERY = 4  # of llama.cpp, whatever a file says


class SmolLM3(GroupedDecoderModel):
    """A SmolLM3-architecture language model with tied embeddings, from its configuration."""

    kind: Literal["smollm3"] = "smollm3"


class SmolLM3Layout(GgufLayout):
    """See ``GgufLayout``."""

    def unfit(self, config: Any) -> Iterator[str]:
        yield from super().unfit(config)
        expected = [int((layer + 1) % UNTURNED_EVERY != 0) for layer in range(config.num_hidden_layers)]
        if list(config.no_rope_layers[: config.num_hidden_layers]) != expected:
            yield f"no_rope_layers {config.no_rope_layers}; expected {expected}"


class SmolLM3Family(DecoderFamily):
    """See ``DecoderFamily``."""

    section = SmolLM3
    architectures = ("SmolLM3ForCausalLM",)
    names = replace(LLAMA_NAMES, per_layer=("layer_types", "no_rope_layers"))
    tied = True
    gguf = SmolLM3Layout(
        architecture="smollm3",
        changes=INTERLEAVED,
        assumed={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    )


FAMILY = SmolLM3Family()
