"""Models: from their configuration, from a directory, or from the teacher."""

from __future__ import annotations

from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from overproof.config.base import RESOURCE, Count, OneOf, Section
from overproof.errors import InputError
from overproof.registry import FAMILIES


class ModelSection(Section):
    """What every description of a model has; ``kind`` names its family, or where its weights come from."""

    kind: str


class LayeredModel(ModelSection):
    """The shape of a model made of equal layers, with fresh weights."""

    hidden_size: Count = Field(description="Width of the residual stream.")
    layers: Count = Field(description="Layers.")
    initializer_range: float = Field(0.02, gt=0, description="Standard deviation of the initial weights.")


class StagedModel(ModelSection):
    """The shape of a model made of stages of convolutional blocks, with fresh weights."""

    hidden_sizes: tuple[Count, ...] = Field(min_length=1, description="Channels of each stage.")
    depths: tuple[Count, ...] = Field(min_length=1, description="Blocks of each stage.")

    def narrowed(self, hidden_sizes: tuple[int, ...]) -> Self:
        """The section of what is left where stages keep so many channels.

        Raises:
            InputError: it has other stages, or fewer channels.
        """
        wanted, there = list(hidden_sizes), list(self.hidden_sizes)
        if len(wanted) != len(there) or any(more > most for more, most in zip(wanted, there, strict=True)):
            raise InputError(
                f"hidden_sizes {wanted}: the teacher has {there}; expected {len(there)} numbers, each at most that"
            )
        return type(self).parse(self.model_dump() | {"hidden_sizes": wanted}, "what is left of the teacher")


class Pretrained(ModelSection):
    """A Hugging Face directory with safetensors and, for text, the tokenizer.json of the data."""

    kind: Literal["pretrained"] = "pretrained"
    path: str = Field(description="Folder or URI: hf://ORG/NAME or hf://ORG/NAME@REVISION, s3://, gs://, ...")


class TeacherLayers(ModelSection):
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


PARTS = ("layers", "intermediate_size", "kv_heads", "hidden_size", "hidden_sizes")  # that a teacher can lose


class Pruned(ModelSection):
    """The teacher without what matters least on train rows: layers, channels of the feed-forward layers, key heads,
    channels between layers; of a convolutional teacher channels of its stages.

    Channels and heads matter by the size of what they give (arXiv 2407.14679), layers by how far they turn what they
    are given (arXiv 2403.03853). What is null stays as the teacher has it.
    """

    kind: Literal["pruned"] = "pruned"
    layers: Count | None = Field(None, description="Layers that stay.")
    intermediate_size: Count | None = Field(None, description="Channels of each feed-forward layer that stay.")
    kv_heads: Count | None = Field(None, description="Key heads of each layer that stay, with their query heads.")
    hidden_size: Count | None = Field(None, description="Channels between layers that stay.")
    hidden_sizes: Annotated[tuple[Count, ...], Field(min_length=1)] | None = Field(
        None, description="Channels of each stage that stay, of a convolutional teacher; inside blocks they follow."
    )
    rows: Count = Field(128, description="Train rows that say what matters, the first in training order.")

    @model_validator(mode="after")
    def _something_goes(self) -> Self:
        if not self.parts:
            raise ValueError(f"pruned: nothing is taken away; expected {', '.join(PARTS[:-1])} or {PARTS[-1]}")
        return self

    @property
    def parts(self) -> tuple[str, ...]:
        """Fields that say how much of something stays."""
        return tuple(name for name in PARTS if getattr(self, name) is not None)

    def stages(self, teacher: str) -> tuple[int, ...]:
        """Channels of each stage that stay, of a convolutional ``teacher``.

        Raises:
            InputError: something else is asked for.
        """
        others = [name for name in self.parts if name != "hidden_sizes"]
        if others or self.hidden_sizes is None:
            raise InputError(f"{others[0]}: {teacher} loses channels of its stages alone; expected hidden_sizes")
        return self.hidden_sizes

    def of(self, teacher: LayeredModel | StagedModel) -> LayeredModel | StagedModel:
        """The section of what is left of a teacher that a recipe describes.

        Raises:
            InputError: it has not as much, its family has no such shape, or heads or channels between layers are asked
                for: fresh heads follow from the width.
        """
        if isinstance(teacher, StagedModel):
            return teacher.narrowed(self.stages(f"a teacher of kind {teacher.kind}"))
        if self.hidden_sizes is not None:
            raise InputError(
                f"hidden_sizes: a teacher of kind {teacher.kind} has no stages; expected null and fewer layers or "
                "other parts, or a convolutional teacher"
            )
        for name in ("kv_heads", "hidden_size"):
            if getattr(self, name) is not None:
                raise InputError(f"{name}: such are taken from pretrained teachers alone; expected null")
        self.require_fewer(teacher.layers, getattr(teacher, "intermediate_size", 0), 0, 0)
        kept = {name: n for name in ("layers", "intermediate_size") if (n := getattr(self, name)) is not None}
        return type(teacher).parse(teacher.model_dump() | kept, "what is left of the teacher")

    def require_fewer(self, layers: int, intermediate: int, kv_heads: int, hidden: int) -> None:
        """Look whether a teacher with so many has more of each.

        Raises:
            InputError: it has not.
        """
        has = {"layers": layers, "intermediate_size": intermediate, "kv_heads": kv_heads, "hidden_size": hidden}
        for name, there in has.items():
            wanted = getattr(self, name)
            if wanted is not None and wanted > there:
                raise InputError(f"{name} {wanted}: the teacher has {there}; expected at most that")


class Served(ModelSection):
    """A teacher that runs elsewhere, behind an OpenAI-compatible endpoint that tells what its model says of the tokens
    of a prompt: vLLM's, or that of ``overproof serve``. Its weights are never here.
    """

    kind: Literal["served"] = "served"
    url: Annotated[str, RESOURCE] = Field(description="Up to the version, such as http://HOST:8000/v1.")
    model: str = Field(description="Its name there, as GET /models lists it.")
    revision: str | None = Field(
        None, description="Of its weights, where the endpoint tells none: another one makes the cache anew."
    )
    key_env: Annotated[str | None, RESOURCE] = Field(
        None, description="Environment variable that holds the API key, on every node; null sends none."
    )
    rows_per_request: Annotated[Count, RESOURCE] = Field(4, description="Rows in a request.")
    concurrent_requests: Annotated[Count, RESOURCE] = Field(8, description="Requests in flight, of each actor.")
    timeout_s: Annotated[float, RESOURCE] = Field(300.0, gt=0, description="Seconds that an answer may take.")
    retry_s: Annotated[float, RESOURCE] = Field(
        600.0, ge=0, description="Seconds after which an endpoint that is busy or away is given up."
    )

    @field_validator("url")
    @classmethod
    def _plain_address(cls, url: str) -> str:
        parts = urlsplit(url)
        if (
            parts.scheme not in ("http", "https")
            or not parts.hostname
            or parts.port == 0
            or parts.query
            or "@" in parts.netloc
        ):
            raise ValueError("expected http://HOST:PORT/v1 or https://..., with the key in the variable of key_env")
        return url.rstrip("/")


Model = Annotated[ModelSection, OneOf(FAMILIES, Pretrained, Served)]
StudentModel = Annotated[ModelSection, OneOf(FAMILIES, TeacherLayers, Pruned, Pretrained)]
