"""Gemma 2 (arXiv 2408.00118): scaled embeddings, norms around attention and feed-forward, capped scores and logits,
and a sliding window in every other layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

from overproof.models.base import DataShape
from overproof.models.decoder import LLAMA_NAMES, DecoderFamily, GroupedDecoderModel, Widths
from overproof.models.gguf_layout import PLUS_ONE, RMS_NORM, SHAPE, GgufContent, GgufLayout, head_width
from overproof.models.sizes import FP32_BYTES, ModelSize

SLIDING, FULL = "sliding_attention", "full_attention"
ACTIVATION = "gelu_pytorch_tanh"


class Gemma2(GroupedDecoderModel):
    """A Gemma-2-architecture language model with tied embeddings, from its configuration."""

    kind: Literal["gemma2"] = "gemma2"


class GemmaLayout(GgufLayout):
    """See ``GgufLayout``. llama.cpp knows which layers slide, and how attention is scaled, by the number of layers."""

    period = 2  # every such layer attends to everything
    largest = 46  # layers of the one model whose attention is scaled by the hidden size over the heads

    def settings(self, content: GgufContent) -> dict[str, Any]:
        read = content.metadata
        wide = read["embedding_length"] // read["attention.head_count"]
        return super().settings(content) | {
            "layer_types": self.layer_types(read["block_count"]),
            "query_pre_attn_scalar": wide if read["block_count"] == self.largest else read["attention.key_length"],
        }

    def layer_types(self, layers: int) -> list[str]:
        """Which of so many layers slide."""
        return [SLIDING if (layer + 1) % self.period else FULL for layer in range(layers)]

    def unfit(self, config: Any) -> Iterator[str]:
        yield from super().unfit(config)
        layers = config.num_hidden_layers
        if list(config.layer_types) != self.layer_types(layers):
            yield f"layer_types {config.layer_types}; expected {self.layer_types(layers)}"
        wide = config.hidden_size // config.num_attention_heads
        scalar = wide if layers == self.largest else head_width(config)
        if config.query_pre_attn_scalar != scalar:
            yield f"query_pre_attn_scalar {config.query_pre_attn_scalar}; expected {scalar}"
        if not config.tie_word_embeddings:
            yield "an output of its own; expected tied embeddings"


class Gemma2Layout(GemmaLayout):
    """See ``GemmaLayout``. Both caps are always applied."""

    def unfit(self, config: Any) -> Iterator[str]:
        yield from super().unfit(config)
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            if getattr(config, name) is None:
                yield f"{name} null; expected a number"


class Gemma2Family(DecoderFamily):
    """See ``DecoderFamily``."""

    section: type[GroupedDecoderModel] = Gemma2
    architectures = ("Gemma2ForCausalLM",)
    names = replace(LLAMA_NAMES, per_layer=("layer_types",), width_goes=False)  # embeddings are scaled by the width
    attention = "eager"  # which alone caps the scores
    varlen = False
    plain_logits = False
    tied = True
    gguf: GemmaLayout = Gemma2Layout(
        architecture="gemma2",
        counts=SHAPE | {"attention.sliding_window": "sliding_window"},
        reals=RMS_NORM
        | {
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        changes={"norm.weight": PLUS_ONE},
        assumed={"hidden_activation": ACTIVATION, "attention_bias": False, "use_bidirectional_attention": None},
        slides=True,
    )

    def settings(self, section: Any, shape: DataShape) -> dict[str, Any]:
        head = section.hidden_size // section.heads
        return super().settings(section, shape) | {"head_dim": head, "query_pre_attn_scalar": head}

    def layer_tensors(self, widths: Widths) -> tuple[int, ...]:
        return (*super().layer_tensors(widths), widths.hidden, widths.hidden)

    def layer_memory(self, size: ModelSize, element_bytes: int) -> int:
        """Attention keeps its scores, capped and as shares, and keys and values once for each query head."""
        copies = 0 if element_bytes == FP32_BYTES else 4
        kept = element_bytes * (10 * size.hidden + 4 * size.query_width + 4 * size.intermediate)
        scores = size.heads * size.places * 2 * FP32_BYTES
        return kept + scores + FP32_BYTES * copies * size.hidden + 4 * FP32_BYTES

    def outer_memory(self, size: ModelSize, element_bytes: int) -> int:
        """The cap on the logits keeps them once more."""
        return super().outer_memory(size, element_bytes) + element_bytes * size.outputs


FAMILY = Gemma2Family()
