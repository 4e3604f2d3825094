"""Granite 3 (IBM): Llama whose embeddings, attention, residual additions and logits are scaled by settings."""

from __future__ import annotations

from typing import Any, Literal

from overproof.models.base import DataShape
from overproof.models.decoder import DecoderFamily, GroupedDecoderModel
from overproof.models.gguf_layout import BIASES, INTERLEAVED, RMS_NORM, GgufLayout


class Granite(GroupedDecoderModel):
    """A Granite-architecture language model with tied embeddings, from its configuration, scaled as Llama is."""

    kind: Literal["granite"] = "granite"


class GraniteFamily(DecoderFamily):
    """See ``DecoderFamily``."""

    section = Granite
    architectures = ("GraniteForCausalLM",)
    plain_logits = False  # they are scaled
    gguf = GgufLayout(
        architecture="granite",
        reals=RMS_NORM
        | {
            "embedding_scale": "embedding_multiplier",
            "attention.scale": "attention_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_scale": "logits_scaling",
        },
        changes=INTERLEAVED,
        assumed={"hidden_act": "silu"},
        optional=BIASES,
        scalings=("default", "linear", "llama3"),
    )

    def settings(self, section: Any, shape: DataShape) -> dict[str, Any]:
        head = section.hidden_size // section.heads
        return super().settings(section, shape) | {"attention_multiplier": head**-0.5}


FAMILY = GraniteFamily()
