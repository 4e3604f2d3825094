"""ModernBERT (arXiv 2412.13663): rotary positions, gated feed-forward, and local attention in two layers of three."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from overproof.config.base import Count
from overproof.models.base import BaseNames, DataShape, FusedAttention, LayerNames
from overproof.models.encoder import Dimensions, Encoder, EncoderFamily
from overproof.models.sizes import FP32_BYTES, ModelSize

if TYPE_CHECKING:
    from torch import Tensor


class ModernBert(Encoder):
    """ModernBERT with a classifier, from its configuration."""

    kind: Literal["modernbert"] = "modernbert"
    local_attention: int = Field(
        128, ge=2, multiple_of=2, description="Tokens that one of a local layer looks at, half of them on each side."
    )
    global_every: Count = Field(3, description="Of so many layers the first is global, the others are local.")


def _tensors(d: Dimensions) -> tuple[int, ...]:
    h, f = d.hidden, d.intermediate
    layer = (3 * h * h, h * h, 2 * f * h, h * f, h, h)  # q k v, o, two of the feed-forward, two norms
    embeddings = (d.vocabulary * h, h)
    return (*embeddings, *layer[:-1], *layer * (d.layers - 1), h, h * h, h, d.classes * h, d.classes)


def _split(config: Any, fused_BPD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    del config
    queries_BPD, keys_BPD, values_BPD = fused_BPD.chunk(3, -1)
    return queries_BPD, keys_BPD, values_BPD


class ModernBertFamily(EncoderFamily):
    """See ``EncoderFamily``."""

    def own_settings(self, section: ModernBert, shape: DataShape) -> dict[str, Any]:
        del shape
        kinds = ("sliding_attention", "full_attention")
        return {
            "local_attention": section.local_attention,
            "layer_types": [kinds[layer % section.global_every == 0] for layer in range(section.layers)],
        }

    def layer_memory(self, size: ModelSize, element_bytes: int) -> int:
        """Norms and their means, q k v and q k as they are turned, attention out and in, both of the gated feed-forward
        with their product and its input; the mask, which each layer casts for itself.
        """
        kept = 10 * size.hidden + 4 * size.intermediate + 4 + size.places
        return element_bytes * kept + FP32_BYTES * size.heads


FAMILY = ModernBertFamily(
    kind="modernbert",
    section=ModernBert,
    prefix="ModernBert",
    bases=("Model", "ForMaskedLM"),
    names=LayerNames(
        layers="model.layers",
        embeddings="model.embeddings.tok_embeddings",
        output="classifier",
        feed_forward=("mlp.Wi", "mlp.Wo"),
        fused=FusedAttention("attn.Wqkv", _split),
        own_settings=("layer_types",),
        first_stays=True,
    ),
    base=BaseNames(optional=("head.", "classifier.", "decoder."), positions=None),
    tensors=_tensors,
    settings=dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")),  # of its own tokenizer
)
