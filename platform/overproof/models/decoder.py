"""Families of causal decoders: what they share, as Llama (arXiv 2302.13971) has it. A family's file says what differs.

Models that are built here have tied embeddings; a directory's may be untied.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, model_validator

from overproof.config.base import Count
from overproof.config.models import LayeredModel
from overproof.models.base import DataShape, LayerNames
from overproof.models.sizes import FP32_BYTES, ModelSize, require_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEAST_POSITIONS = 2048
HEAD = "lm_head.weight"
CONSTANTS = re.compile(r"(rotary_emb\.inv_freq|\.attn\.(masked_)?bias)$")
ROTARY_BASE = 10000.0
MODEL_SUFFIX = re.compile(r"(ForCausalLM|LMHeadModel)$")  # of an architecture's name
LLAMA_NAMES = LayerNames(
    layers="model.layers",
    embeddings="model.embed_tokens",
    output="lm_head",
    feed_forward=("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    queries="self_attn.q_proj",
    keys="self_attn.k_proj",
    values="self_attn.v_proj",
    attention_output="self_attn.o_proj",
    width_goes=True,
)


class DecoderModel(LayeredModel):
    """The shape of a decoder with fresh weights."""

    hidden_size: int = Field(ge=32, multiple_of=32, description="Width of the residual stream.")
    intermediate_size: int = Field(ge=32, multiple_of=32, description="Width of the feed-forward layer.")
    layers: Count = Field(description="Decoder layers.")
    heads: Count = Field(description="Query heads.")

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % self.heads or (self.hidden_size // self.heads) % 2:
            raise ValueError(
                f"hidden_size {self.hidden_size} over heads {self.heads} is "
                f"{self.hidden_size / self.heads:g}; expected an even whole number"
            )
        if self.heads % self.key_heads:
            raise ValueError(f"kv_heads {self.key_heads} does not divide heads {self.heads}")
        return self

    @property
    def key_heads(self) -> int:
        """Key and value heads."""
        return self.heads


class GroupedDecoderModel(DecoderModel):
    """The same where several query heads share a key and a value (arXiv 2305.13245)."""

    kv_heads: Count = Field(description="Key and value heads; divides heads.")

    @property
    def key_heads(self) -> int:
        return self.kv_heads


@dataclass(frozen=True)
class Widths:
    """The numbers from which a decoder's tensors follow."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head: int  # numbers in one head's query

    @property
    def queries(self) -> int:
        """Of all query heads together."""
        return self.head * self.heads

    @property
    def keys(self) -> int:
        """Of all key heads together."""
        return self.head * self.kv_heads


def own_tensors(names: Iterable[str], tied: bool) -> list[str]:
    """Those that are no constants, as some directories hold them, and no second name of the embeddings."""
    return [name for name in names if not CONSTANTS.search(name) and not (tied and name == HEAD)]


class DecoderFamily:
    """See ``ModelFamily`` and ``GgufFamily``."""

    section: type[DecoderModel] | None
    architectures: tuple[str, ...]
    tasks: tuple[str, ...] = ("language_modeling", "chat")
    names = LLAMA_NAMES
    attention: str | None = "sdpa"
    varlen = True
    plain_logits = True
    tied = False  # where config.json does not say
    config_name: str | None = None  # of the class in transformers, where it is not that of the architecture

    def configuration(self, section: Any, shape: DataShape) -> Any:
        """Rotary positions have no table, so a longer limit than the rows' costs nothing and lets an engine serve past
        it; how good the model is out there is for the user to measure.
        """
        return self.configuration_class()(
            vocab_size=shape.outputs,
            tie_word_embeddings=True,
            initializer_range=section.initializer_range,
            bos_token_id=shape.bos_id,
            eos_token_id=shape.end_id,
            pad_token_id=None,
            attn_implementation=self.attention,
            **self.settings(section, shape),
        )

    def settings(self, section: Any, shape: DataShape) -> dict[str, Any]:
        """The family's own names of a section's numbers."""
        return {
            "hidden_size": section.hidden_size,
            "intermediate_size": section.intermediate_size,
            "num_hidden_layers": section.layers,
            "num_attention_heads": section.heads,
            "num_key_value_heads": section.key_heads,
            "max_position_embeddings": max(LEAST_POSITIONS, shape.positions),
            "rope_parameters": {"rope_type": "default", "rope_theta": ROTARY_BASE},
        }

    def configuration_class(self) -> Any:
        """The model class's own, which needs no torch, and is there in a quarter of the time."""
        import transformers

        name = self.config_name or f"{MODEL_SUFFIX.sub('', self.architectures[0])}Config"
        return getattr(transformers, name)

    def model_class(self) -> type[PreTrainedModel]:
        import transformers

        found: type[PreTrainedModel] = getattr(transformers, self.architectures[0])
        return found

    def untied(self, config: Any, names: list[str]) -> list[str]:
        return own_tensors(names, config.tie_word_embeddings)

    def size(self, section: Any, shape: DataShape) -> ModelSize:
        h, outputs = section.hidden_size, shape.outputs
        widths = Widths(
            h, section.intermediate_size, section.layers, section.heads, section.key_heads, h // section.heads
        )
        tensors = (outputs * h, *self.layer_tensors(widths) * section.layers, *self.outer_tensors(widths, shape))
        return self._size(section.kind, widths, outputs, shape, tensors)

    def layer_tensors(self, widths: Widths) -> tuple[int, ...]:
        """Numbers in each tensor of a layer."""
        h, f, q, k = widths.hidden, widths.intermediate, widths.queries, widths.keys
        return (q * h, k * h, k * h, h * q, f * h, f * h, h * f, h, h)  # q k v o, gate up down, two norms

    def outer_tensors(self, widths: Widths, shape: DataShape) -> tuple[int, ...]:
        """The same outside the layers, beside the embeddings."""
        del shape
        return (widths.hidden,)  # the last norm

    def directory_size(self, config: Mapping[str, Any], tensors: Mapping[str, int], shape: DataShape) -> ModelSize:
        require_positions(config, shape.positions)
        once = own_tensors(tensors, config.get("tie_word_embeddings", self.tied))
        entries = int(config["vocab_size"])
        outputs = min(entries, shape.outputs or entries)  # padding beyond the data's vocabulary is cut off
        tables = (f"{self.names.embeddings.rsplit('.', 1)[-1]}.weight", HEAD)
        sizes = (tensors[n] // entries * outputs if n.endswith(tables) else tensors[n] for n in once)
        return self._size(self.kind, self.directory_widths(config), outputs, shape, tuple(sizes))

    @property
    def kind(self) -> str:
        """Its name in the registry."""
        assert self.section is not None
        kind: str = self.section.model_fields["kind"].default
        return kind

    def directory_widths(self, config: Mapping[str, Any]) -> Widths:
        """Of a directory's config.json.

        Raises:
            KeyError, TypeError, ValueError: a field is missing or is no number.
        """
        h, f, layers, heads = (
            int(config[key]) for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        )
        return Widths(
            h, f, layers, heads, int(config.get("num_key_value_heads") or heads),
            int(config.get("head_dim") or h // heads),
        )  # fmt: skip

    def _size(self, kind: str, widths: Widths, outputs: int, shape: DataShape, tensors: tuple[int, ...]) -> ModelSize:
        table = outputs * widths.hidden
        return ModelSize(
            family=kind, hidden=widths.hidden, intermediate=widths.intermediate, layers=widths.layers,
            heads=widths.heads, query_width=widths.queries, key_width=widths.keys, places=shape.positions,
            outputs=outputs, predictions=shape.positions, tensors=tensors,
            looked_up=table if tensors.count(table) > 1 else 0,  # a tied one is multiplied with, at the end
            masked=self.mask_numbers(widths, shape) if shape.apart else 0,
        )  # fmt: skip

    def mask_numbers(self, widths: Widths, shape: DataShape) -> int:
        """Numbers that a layer keeps more of a place where a mask keeps texts apart: the mask's own, which SDPA makes
        of it, and keys and values once for each query head. Other attention shares one mask and repeats them anyway.
        """
        if self.attention != "sdpa":
            return 0
        repeated = 2 * (widths.queries - widths.keys) if widths.kv_heads > 1 else 0
        return shape.positions + repeated

    def layer_memory(self, size: ModelSize, element_bytes: int) -> int:
        """RMSNorm computes in fp32: 16-bit inputs are copied, twice."""
        wide, copies = (6, 0) if element_bytes == FP32_BYTES else (4, 2)
        attention = 2 * size.query_width + 2 * size.key_width
        kept = element_bytes * (wide * size.hidden + attention + 4 * size.intermediate)
        return kept + FP32_BYTES * copies * size.hidden + FP32_BYTES * size.heads + 2 * FP32_BYTES

    def outer_memory(self, size: ModelSize, element_bytes: int) -> int:
        return (3 * element_bytes + (FP32_BYTES - element_bytes)) * size.hidden
