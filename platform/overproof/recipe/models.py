"""Models: from their configuration, or from a directory."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from overproof.recipe.section import Count, Section


class Llama(Section):
    """A Llama-architecture language model with tied embeddings, from its configuration."""

    kind: Literal["llama"] = "llama"
    hidden_size: int = Field(ge=32, multiple_of=32, description="Width of the residual stream.")
    intermediate_size: int = Field(ge=32, multiple_of=32, description="Width of the feed-forward layer.")
    layers: Count = Field(description="Decoder layers.")
    heads: Count = Field(description="Query heads.")
    kv_heads: Count = Field(description="Key and value heads; divides heads.")
    initializer_range: float = Field(0.02, gt=0, description="Standard deviation of the initial weights.")

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


class Vit(Section):
    """A vision transformer for 8x8 grey images, from its configuration (arXiv 2010.11929)."""

    kind: Literal["vit"] = "vit"
    hidden_size: Count = Field(description="Width of the residual stream.")
    intermediate_size: Count = Field(description="Width of the feed-forward layer.")
    layers: Count = Field(description="Encoder layers.")
    heads: Count = Field(description="Attention heads; divides hidden_size.")
    patch_size: Literal[1, 2, 4] = Field(2, description="Patch edge in pixels.")
    initializer_range: float = Field(0.02, gt=0, description="Standard deviation of the initial weights.")

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % self.heads:
            raise ValueError(f"heads {self.heads} does not divide hidden_size {self.hidden_size}")
        return self


class Pretrained(Section):
    """A Hugging Face directory with safetensors and, for text, the tokenizer.json of the data."""

    kind: Literal["pretrained"] = "pretrained"
    path: str = Field(description="Local directory.")


Model = Annotated[Llama | Vit | Pretrained, Field(discriminator="kind")]
