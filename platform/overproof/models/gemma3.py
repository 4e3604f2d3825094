"""Gemma 3's text models (arXiv 2503.19786): Gemma 2 with a norm on each head's query and key instead of caps, a sliding
window in five layers of six, and another rotary base in those.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from overproof.models import gguf_rope
from overproof.models.base import DataShape
from overproof.models.decoder import DecoderFamily, GroupedDecoderModel, Widths
from overproof.models.gemma2 import ACTIVATION, FULL, SLIDING, Gemma2Family, GemmaLayout
from overproof.models.gguf_layout import PLUS_ONE, SHAPE, GgufContent, Weights, head_width
from overproof.models.qwen3 import normed_heads_memory
from overproof.models.sizes import FP32_BYTES, ModelSize

SLIDING_BASE = "rope.freq_base_swa"


class Gemma3(GroupedDecoderModel):
    """A Gemma-3-architecture text model with tied embeddings, from its configuration."""

    kind: Literal["gemma3"] = "gemma3"


class Gemma3Layout(GemmaLayout):
    """See ``GemmaLayout``."""

    period = 6
    largest = 62

    def rope(self, config: Any) -> dict[str, Any]:
        full, sliding = config.rope_parameters[FULL], config.rope_parameters[SLIDING]
        found = gguf_rope.metadata(full, head_width(config), config.max_position_embeddings)
        return {**found, SLIDING_BASE: float(sliding["rope_theta"])}

    def extra_tensors(self, config: Any) -> dict[str, Weights]:
        del config
        return {}

    def context_length(self, config: Any) -> int:
        return int(config.max_position_embeddings)

    def settings(self, content: GgufContent) -> dict[str, Any]:
        found = super().settings(content)
        sliding = {"rope_type": "default", "rope_theta": content.metadata[SLIDING_BASE]}
        return found | {"rope_parameters": {FULL: found["rope_parameters"], SLIDING: sliding}}

    def rope_unfit(self, config: Any) -> Iterator[str]:
        for kind, known in ((FULL, ("default", "linear")), (SLIDING, ("default",))):
            found = config.rope_parameters[kind]["rope_type"]
            if found not in known:
                yield f"rope_type {found!r} of {kind}; expected {' or '.join(map(repr, known))}"


class Gemma3Family(Gemma2Family):
    """See ``DecoderFamily``."""

    section = Gemma3
    architectures = ("Gemma3ForCausalLM",)
    config_name = "Gemma3TextConfig"
    attention = "sdpa"
    varlen = True
    gguf = Gemma3Layout(
        architecture="gemma3",
        counts=SHAPE | {"attention.sliding_window": "sliding_window"},
        changes={"norm.weight": PLUS_ONE},
        assumed={
            "hidden_activation": ACTIVATION,
            "attention_bias": False,
            "use_bidirectional_attention": False,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
        },
        slides=True,
    )

    def settings(self, section: Any, shape: DataShape) -> dict[str, Any]:
        found = super().settings(section, shape)
        return found | {"rope_parameters": {kind: dict(found["rope_parameters"]) for kind in (FULL, SLIDING)}}

    def layer_tensors(self, widths: Widths) -> tuple[int, ...]:
        return (*super().layer_tensors(widths), widths.head, widths.head)

    def layer_memory(self, size: ModelSize, element_bytes: int) -> int:
        copies = 0 if element_bytes == FP32_BYTES else 4
        attention = 2 * size.query_width + 2 * size.key_width
        kept = element_bytes * (10 * size.hidden + attention + 4 * size.intermediate)
        norms = FP32_BYTES * copies * size.hidden + 4 * FP32_BYTES + FP32_BYTES * size.heads
        return kept + norms + normed_heads_memory(size, FP32_BYTES)

    def outer_memory(self, size: ModelSize, element_bytes: int) -> int:
        return DecoderFamily.outer_memory(self, size, element_bytes)


FAMILY = Gemma3Family()
