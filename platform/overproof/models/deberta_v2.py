"""DeBERTa-v2 and v3 (arXiv 2006.03654, 2111.09543): attention goes by tokens and by their relative positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from overproof.errors import InputError
from overproof.models.base import BaseNames, DataShape, LayerNames
from overproof.models.encoder import Dimensions, Encoder, EncoderFamily
from overproof.models.sizes import ModelSize

FARTHEST = 512  # tokens: what lies farther has the relative position of the last bucket; as DeBERTa-v3 has it

# What every DeBERTa-v2 and v3 has; ``size``, features and exports are held against models of these settings.
ASSUMED: dict[str, Any] = {
    "relative_attention": True,
    "position_biased_input": False,
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
}


class DebertaV2(Encoder):
    """DeBERTa-v3 with a classifier, from its configuration."""

    kind: Literal["deberta_v2"] = "deberta_v2"
    position_buckets: int = Field(
        256,
        ge=4,
        description="Relative positions told apart on each side: near ones each, far ones the more together.",
    )


def _tensors(d: Dimensions) -> tuple[int, ...]:
    h, f = d.hidden, d.intermediate
    segments = (d.segments * h,) if d.segments else ()
    layer = (h * h, h) * 4 + (f * h, f, h * f, h) + (h, h) * 2  # q k v o, two of the feed-forward, two norms
    outside = (d.relative * h, h, h) + ((d.kernel * h * h, h, h, h) if d.kernel else ())  # each with its norm
    return (d.vocabulary * h, *segments, h, h, *layer * d.layers, *outside, h * h, h, d.classes * h, d.classes)


class DebertaV2Family(EncoderFamily):
    """See ``EncoderFamily``."""

    def own_settings(self, section: DebertaV2, shape: DataShape) -> dict[str, Any]:
        farthest = max(FARTHEST, int(shape.details["sequence_length"]), section.position_buckets)
        return {"position_buckets": section.position_buckets, "max_relative_positions": farthest}

    def require(self, config: Mapping[str, Any]) -> None:
        read = {name: config.get(name) for name in ASSUMED}
        sides = config.get("pos_att_type") or ()
        found = {
            **read,
            "pos_att_type": sorted(sides.lower().split("|") if isinstance(sides, str) else sides),
            "position_buckets": int(config.get("position_buckets", -1)) > 0,
            "embedding_size": config.get("embedding_size", config["hidden_size"]),
        }
        expected = {
            **ASSUMED, "pos_att_type": ["c2p", "p2c"], "position_buckets": True, "embedding_size": config["hidden_size"]
        }  # fmt: skip
        for name, value in expected.items():
            if found[name] != value:
                raise InputError(
                    f"config.json: {name}: found {config.get(name)!r}; expected it as DeBERTa-v2 and v3 have it"
                )

    def dimensions(self, section: Any, shape: DataShape) -> Dimensions:
        return super().dimensions(section, shape)._replace(relative=2 * section.position_buckets)

    def directory_dimensions(self, config: Mapping[str, Any], shape: DataShape) -> Dimensions:
        return (
            super()
            .directory_dimensions(config, shape)
            ._replace(relative=2 * int(config["position_buckets"]), kernel=int(config.get("conv_kernel_size", 0)))
        )

    def layer_memory(self, size: ModelSize, element_bytes: int) -> int:
        """Two norms and their means, q k v and k once more, attention out and in, two of the feed-forward; shares of
        attention, and scores by relative position from either side, whose tables are repeated for every row.
        """
        kept = 9 * size.hidden + 2 * size.intermediate + 4 + size.heads * (size.places + 2 * size.relative)
        return element_bytes * (kept + 2 * size.hidden * size.relative // size.places)

    def fitted(self, config: Any, shape: DataShape) -> Any:
        """What lies far in the rows lies as far as it did: the farthest may be told by the longest row."""
        changed = super().fitted(config, shape)
        if changed.max_relative_positions < 1:
            changed.max_relative_positions = config.max_position_embeddings
        return changed


FAMILY = DebertaV2Family(
    kind="deberta_v2",
    section=DebertaV2,
    prefix="DebertaV2",
    bases=("Model", "ForMaskedLM"),
    names=LayerNames(
        layers="deberta.encoder.layer",
        embeddings="deberta.embeddings.word_embeddings",
        output="classifier",
        feed_forward=("intermediate.dense", "output.dense"),
        queries="attention.self.query_proj",
        keys="attention.self.key_proj",
        values="attention.self.value_proj",
    ),
    base=BaseNames(
        optional=("pooler.", "classifier.", "cls.", "lm_predictions.", "mask_predictions."),
        positions=None,
    ),
    tensors=_tensors,
    settings={
        **ASSUMED,
        "pos_att_type": ["p2c", "c2p"],
        "type_vocab_size": 0,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    },
    segments=0,
    attention="eager",
)
