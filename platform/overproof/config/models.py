"""Models: from their configuration, from a directory, or from the teacher."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from overproof.config.base import Count, Section
from overproof.errors import InputError


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
    path: str = Field(description="Folder or URI (s3://, gs://, ...).")


class TeacherLayers(Section):
    """The teacher with fewer layers; those, the embeddings and the head keep its weights (arXiv 1910.01108)."""

    kind: Literal["teacher_layers"] = "teacher_layers"
    layers: Count | tuple[Annotated[int, Field(ge=0)], ...] = Field(
        description="How many, evenly spaced from the first to the last; or which, such as [0, 2, 5], counted from 0."
    )

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        named = self.layers
        if not isinstance(named, int) and (not named or list(named) != sorted(set(named))):
            raise ValueError(f"layers {list(named)}: expected at least one, in ascending order and none twice")
        return self

    @property
    def count(self) -> int:
        """Layers that stay."""
        return self.layers if isinstance(self.layers, int) else len(self.layers)

    def of(self, teacher: int) -> tuple[int, ...]:
        """Which stay, of a teacher with this many layers.

        Raises:
            InputError: it has fewer.
        """
        wanted = self.layers if isinstance(self.layers, int) else self.layers[-1] + 1
        if wanted > teacher:
            raise InputError(f"layers {self.model_dump(mode='json')['layers']}: the teacher has {teacher}")
        if not isinstance(self.layers, int):
            return self.layers
        gaps = max(1, self.layers - 1)
        return tuple((2 * i * (teacher - 1) + gaps) // (2 * gaps) for i in range(self.layers))


Model = Annotated[Llama | Vit | Pretrained, Field(discriminator="kind")]
StudentModel = Annotated[Llama | Vit | TeacherLayers | Pretrained, Field(discriminator="kind")]
