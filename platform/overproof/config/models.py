"""Models: from their configuration, from a directory, or from the teacher."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from overproof.config.base import RESOURCE, Count, Fraction, OneOf, Section
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


class OfTeacher(ModelSection):
    """A student that is made from its teacher: shape and weights follow from it."""

    @property
    @abstractmethod
    def kept_layers(self) -> int | None:
        """Layers that stay; None where all do."""

    def further_steps(self, steps: int) -> tuple[int, ...]:
        """Those of a training of so many after which a further part goes."""
        del steps
        return ()

    @abstractmethod
    def left_of(self, teacher: LayeredModel | StagedModel) -> LayeredModel | StagedModel:
        """The section of what is left of a teacher that a recipe describes.

        Raises:
            InputError: it cannot be made from that.
        """

    @abstractmethod
    def require_possible(self, layers: int, intermediate: int, kv_heads: int, hidden: int) -> None:
        """Look whether it can be made from a teacher with so many layers, channels of each feed-forward layer, key
        heads, and channels between layers.

        Raises:
            InputError: it cannot.
        """


def no_equal_layers(student: OfTeacher, teacher: str) -> InputError:
    """Of a student whose ``teacher`` is convolutional."""
    return InputError(
        f"kind {student.kind}: {teacher} has stages of blocks, and no equal layers; expected {{kind: pruned, "
        "hidden_sizes: ...}"
    )


class TeacherLayers(OfTeacher):
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

    @property
    def kept_layers(self) -> int:
        return self.count

    def left_of(self, teacher: LayeredModel | StagedModel) -> LayeredModel:
        if isinstance(teacher, StagedModel):
            raise no_equal_layers(self, f"a teacher of kind {teacher.kind}")
        self.of(teacher.layers)
        return teacher.model_copy(update={"layers": self.count})

    def require_possible(self, layers: int, intermediate: int, kv_heads: int, hidden: int) -> None:
        del intermediate, kv_heads, hidden
        self.of(layers)

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


BLOCK = 32  # numbers that share a scale in most formats
PARTS = ("layers", "intermediate_size", "kv_heads", "hidden_size", "hidden_sizes")  # that a teacher can lose


class Pruned(OfTeacher):
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
    rounds: Count = Field(
        1,
        description="Parts in which it goes, at equal distances of steps, each measured anew on what is left by then; "
        "1 takes all of it before the first step.",
    )

    @model_validator(mode="after")
    def _something_goes(self) -> Self:
        if not self.parts:
            raise ValueError(f"pruned: nothing is taken away; expected {', '.join(PARTS[:-1])} or {PARTS[-1]}")
        return self

    @property
    def parts(self) -> tuple[str, ...]:
        """Fields that say how much of something stays."""
        return tuple(name for name in PARTS if getattr(self, name) is not None)

    @property
    def kept_layers(self) -> int | None:
        return self.layers

    def further_steps(self, steps: int) -> tuple[int, ...]:
        """Those of a training of so many after which a further part goes; the first goes before it begins."""
        return tuple(steps * done // self.rounds for done in range(1, self.rounds))

    def after(self, rounds: int, layers: int, intermediate: int, kv_heads: int, hidden: int) -> Self:
        """What stays after so many rounds, of a teacher with so many of each. Widths that blocks of 32 divide before
        and after are so in between, too.
        """
        has = {
            "layers": (layers, 1), "kv_heads": (kv_heads, 1),
            "intermediate_size": (intermediate, BLOCK), "hidden_size": (hidden, BLOCK),
        }  # fmt: skip
        left = dict[str, int]()
        for name, (there, block) in has.items():
            wanted = getattr(self, name)
            if wanted is not None:
                step = math.gcd(there, wanted, block)
                left[name] = there - step * ((there - wanted) // step * rounds // self.rounds)
        return self.model_copy(update=left)

    def stages(self, teacher: str) -> tuple[int, ...]:
        """Channels of each stage that stay, of a convolutional ``teacher``.

        Raises:
            InputError: something else is asked for.
        """
        others = [name for name in self.parts if name != "hidden_sizes"]
        if others or self.hidden_sizes is None:
            raise InputError(f"{others[0]}: {teacher} loses channels of its stages alone; expected hidden_sizes")
        if self.rounds > 1:
            raise InputError(f"rounds {self.rounds}: {teacher} loses channels of its stages at once; expected 1")
        return self.hidden_sizes

    def left_of(self, teacher: LayeredModel | StagedModel) -> LayeredModel | StagedModel:
        """See ``OfTeacher``. Heads and channels between layers are refused: fresh heads follow from the width."""
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
        self.require_possible(teacher.layers, getattr(teacher, "intermediate_size", 0), 0, 0)
        kept = {name: n for name in ("layers", "intermediate_size") if (n := getattr(self, name)) is not None}
        return type(teacher).parse(teacher.model_dump() | kept, "what is left of the teacher")

    def require_possible(self, layers: int, intermediate: int, kv_heads: int, hidden: int) -> None:
        has = {"layers": layers, "intermediate_size": intermediate, "kv_heads": kv_heads, "hidden_size": hidden}
        for name, there in has.items():
            wanted = getattr(self, name)
            if wanted is not None and wanted > there:
                raise InputError(f"{name} {wanted}: the teacher has {there}; expected at most that")


class Masked(OfTeacher):
    """Experimental, for study: the teacher with part of each matrix of its layers at zero, which stays zero in
    training. Its files are no smaller and no faster, since no engine here skips zeros.

    What goes is what is smallest by itself (magnitude, arXiv 1506.02626), or times the norm of its inputs within each
    output (wanda, arXiv 2306.11695), or what costs the outputs least once other weights make up for it (sparsegpt,
    arXiv 2301.00774).
    """

    kind: Literal["masked"] = "masked"
    method: Literal["magnitude", "wanda", "sparsegpt"] = Field(description="What chooses the weights that go.")
    sparsity: Fraction | None = Field(None, description="Share of each matrix that is zero; or give a pattern.")
    pattern: Literal["2:4"] | None = Field(
        None, description="Of every four neighbours in a row of a matrix two are zero; or give a sparsity."
    )
    rows: Count = Field(128, description="Train rows that wanda and sparsegpt are calibrated on, the first in order.")

    @model_validator(mode="after")
    def _one_measure(self) -> Self:
        if (self.sparsity is None) == (self.pattern is None):
            found = "neither" if self.sparsity is None else f"sparsity {self.sparsity:g} and pattern {self.pattern}"
            raise ValueError(f"masked: found {found}; expected one of sparsity, such as 0.5, and pattern, '2:4'")
        return self

    @property
    def kept_layers(self) -> None:
        return None

    def left_of(self, teacher: LayeredModel | StagedModel) -> LayeredModel:
        if isinstance(teacher, StagedModel):
            raise no_equal_layers(self, f"a teacher of kind {teacher.kind}")
        names = FAMILIES[teacher.kind].names
        self.require_linear(names.linear and bool(names.feed_forward), f"layers of {teacher.kind}")
        self.require_possible(teacher.layers, getattr(teacher, "intermediate_size", 0), 0, teacher.hidden_size)
        return teacher

    def require_possible(self, layers: int, intermediate: int, kv_heads: int, hidden: int) -> None:
        del layers, kv_heads
        self.require_columns(hidden, "hidden_size")
        self.require_columns(intermediate, "intermediate_size")

    def require_columns(self, columns: int, what: str) -> None:
        """Look whether rows of so many columns can have the pattern.

        Raises:
            InputError: they are no multiple of 4.
        """
        if self.pattern is not None and columns % 4:
            raise InputError(f"pattern {self.pattern}: {what} is {columns}; expected a multiple of 4, or sparsity: 0.5")

    def require_linear(self, linear: bool, what: str) -> None:
        """Look whether a teacher's layers hold the matrices that are masked.

        Raises:
            InputError: they do not.
        """
        if not linear:
            raise InputError(
                f"kind masked: found {what}, whose matrices are Conv1D or none; expected layers of nn.Linear, such as "
                "those of llama"
            )


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
StudentModel = Annotated[ModelSection, OneOf(FAMILIES, TeacherLayers, Pruned, Masked, Pretrained)]
