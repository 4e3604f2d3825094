"""GPT-2 (Radford et al., 2019): a table of positions, biases everywhere, queries, keys and values in one matrix."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from overproof.models.base import DataShape, FusedAttention, LayerNames
from overproof.models.decoder import DecoderFamily, DecoderModel, Widths
from overproof.models.gguf_layout import TRANSPOSED, GgufContent, GgufLayout, Weights
from overproof.models.sizes import FP32_BYTES, ModelSize

if TYPE_CHECKING:
    from torch import Tensor


class Gpt2(DecoderModel):
    """A GPT-2-architecture language model with tied embeddings, from its configuration; its context is that of the
    data.
    """

    kind: Literal["gpt2"] = "gpt2"


class Gpt2Layout(GgufLayout):
    """See ``GgufLayout``."""

    def metadata(self, config: Any) -> dict[str, Any]:
        counts = {key: int(getattr(config, name)) for key, name in self.counts.items()}
        reals = {key: float(getattr(config, name)) for key, name in self.reals.items()}
        return {**counts, **reals, "feed_forward_length": config.n_inner or 4 * config.n_embd}

    def settings(self, content: GgufContent) -> dict[str, Any]:
        return self.figures(content) | {"n_inner": content.metadata["feed_forward_length"]}

    def extra_tensors(self, config: Any) -> dict[str, Weights]:
        del config
        return {}

    def rope_unfit(self, config: Any) -> Iterator[str]:
        del config
        yield from ()


def _split(config: Any, fused_BPD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    width = config.n_embd
    return fused_BPD[..., :width], fused_BPD[..., width : 2 * width], fused_BPD[..., 2 * width :]


class Gpt2Family(DecoderFamily):
    """See ``DecoderFamily``."""

    section = Gpt2
    architectures = ("GPT2LMHeadModel",)
    names = LayerNames(
        layers="transformer.h",
        embeddings="transformer.wte",
        output="lm_head",
        feed_forward=("mlp.c_fc", "mlp.c_proj"),
        fused=FusedAttention("attn.c_attn", _split),
        linear=False,
        intermediate="n_inner",
    )
    tied = True
    gguf = Gpt2Layout(
        architecture="gpt2",
        counts={
            "vocab_size": "vocab_size",
            "context_length": "n_positions",
            "embedding_length": "n_embd",
            "block_count": "n_layer",
            "attention.head_count": "n_head",
        },
        reals={"attention.layer_norm_epsilon": "layer_norm_epsilon"},
        changes={f"{name}.weight": TRANSPOSED for name in ("c_attn", "c_proj", "c_fc")},
        assumed={
            "activation_function": "gelu_new",
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
    )

    def settings(self, section: Any, shape: DataShape) -> dict[str, Any]:
        return {
            "n_positions": shape.positions,
            "n_embd": section.hidden_size,
            "n_inner": section.intermediate_size,
            "n_layer": section.layers,
            "n_head": section.heads,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        }

    def layer_tensors(self, widths: Widths) -> tuple[int, ...]:
        h, f = widths.hidden, widths.intermediate
        return (3 * h * h, 3 * h, h * h, h, f * h, f, h * f, h, h, h, h, h)  # qkv, out, up, down, two norms

    def outer_tensors(self, widths: Widths, shape: DataShape) -> tuple[int, ...]:
        return (shape.positions * widths.hidden, widths.hidden, widths.hidden)  # positions, the last norm

    def directory_widths(self, config: Mapping[str, Any]) -> Widths:
        h, layers, heads = (int(config[key]) for key in ("n_embd", "n_layer", "n_head"))
        return Widths(h, int(config.get("n_inner") or 4 * h), layers, heads, heads, h // heads)

    def layer_memory(self, size: ModelSize, element_bytes: int) -> int:
        """Two norms, queries, keys and values, attention, and five of GELU, which is written out."""
        kept = element_bytes * (8 * size.hidden + 5 * size.intermediate)
        return kept + FP32_BYTES * size.heads + 4 * element_bytes

    def outer_memory(self, size: ModelSize, element_bytes: int) -> int:
        return 2 * element_bytes * size.hidden


FAMILY = Gpt2Family()
