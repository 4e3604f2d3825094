"""Llama-shaped language models (arXiv 2302.13971), with tied embeddings when they are built here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from overproof.config.base import Count
from overproof.config.models import LayeredModel
from overproof.models.base import DataShape, LayerNames
from overproof.models.sizes import FP32_BYTES, ModelSize

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEAST_POSITIONS = 2048
HEAD = "lm_head.weight"


class Llama(LayeredModel):
    """A Llama-architecture language model with tied embeddings, from its configuration."""

    kind: Literal["llama"] = "llama"
    hidden_size: int = Field(ge=32, multiple_of=32, description="Width of the residual stream.")
    intermediate_size: int = Field(ge=32, multiple_of=32, description="Width of the feed-forward layer.")
    layers: Count = Field(description="Decoder layers.")
    heads: Count = Field(description="Query heads.")
    kv_heads: Count = Field(description="Key and value heads; divides heads.")

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % self.heads or (self.hidden_size // self.heads) % 2:
            raise ValueError(
                f"hidden_size {self.hidden_size} over heads {self.heads} is "
                f"{self.hidden_size / self.heads:g}; expected an even whole number"
            )
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads {self.kv_heads} does not divide heads {self.heads}")
        return self


class LlamaFamily:
    """See ``ModelFamily``."""

    section = Llama
    tasks = ("language_modeling",)
    architectures = ("LlamaForCausalLM",)
    names = LayerNames(
        layers="model.layers",
        embeddings="model.embed_tokens",
        feed_forward=("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
        queries="self_attn.q_proj",
        keys="self_attn.k_proj",
        values="self_attn.v_proj",
    )

    def configuration(self, section: Llama, shape: DataShape) -> Any:
        """Rotary positions have no table, so a longer limit than the rows' costs nothing and lets an engine serve past
        it; how good the model is out there is for the user to measure.
        """
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=shape.outputs,
            hidden_size=section.hidden_size,
            intermediate_size=section.intermediate_size,
            num_hidden_layers=section.layers,
            num_attention_heads=section.heads,
            num_key_value_heads=section.kv_heads,
            max_position_embeddings=max(LEAST_POSITIONS, shape.positions),
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=True,
            initializer_range=section.initializer_range,
            bos_token_id=shape.bos_id,
            eos_token_id=shape.end_id,
            attn_implementation="sdpa",
        )

    def model_class(self) -> type[PreTrainedModel]:
        from transformers import LlamaForCausalLM

        return LlamaForCausalLM  # type: ignore[no-any-return]

    def untied(self, config: Any, names: list[str]) -> list[str]:
        return [name for name in names if name != HEAD or not config.tie_word_embeddings]

    def size(self, section: Llama, shape: DataShape) -> ModelSize:
        h, f, outputs = section.hidden_size, section.intermediate_size, shape.outputs
        keys = h // section.heads * section.kv_heads
        layer = (h * h, keys * h, keys * h, h * h, f * h, f * h, h * f, h, h)  # q k v o, gate up down, two norms
        return ModelSize(
            family="llama", hidden=h, intermediate=f, layers=section.layers, heads=section.heads, query_width=h,
            key_width=keys, places=shape.positions, outputs=outputs, predictions=shape.positions,
            tensors=(outputs * h, *layer * section.layers, h),
        )  # fmt: skip

    def directory_size(self, config: Mapping[str, Any], tensors: Mapping[str, int], shape: DataShape) -> ModelSize:
        h, f, layers, heads = (
            int(config[key]) for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        )
        head = config.get("head_dim") or h // heads
        once = {name: size for name, size in tensors.items() if name != HEAD or not config.get("tie_word_embeddings")}
        return ModelSize(
            family="llama", hidden=h, intermediate=f, layers=layers, heads=heads, query_width=head * heads,
            key_width=head * int(config["num_key_value_heads"]), places=shape.positions,
            outputs=int(config["vocab_size"]), predictions=shape.positions, tensors=tuple(once.values()),
        )  # fmt: skip

    def layer_memory(self, size: ModelSize, element_bytes: int) -> int:
        """RMSNorm computes in fp32: 16-bit inputs are copied, twice."""
        wide, copies = (8, 0) if element_bytes == FP32_BYTES else (6, 2)
        kept = element_bytes * (wide * size.hidden + 2 * size.key_width + 4 * size.intermediate)
        return kept + FP32_BYTES * copies * size.hidden + FP32_BYTES * size.heads + 2 * FP32_BYTES

    def outer_memory(self, element_bytes: int) -> int:
        return 3 * element_bytes + (FP32_BYTES - element_bytes)


FAMILY = LlamaFamily()
