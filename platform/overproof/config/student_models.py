"""Students that are made from their teacher: with fewer layers, pruned, or masked."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from overproof.config.base import Count, Fraction, OneOf
from overproof.config.models import LayeredModel, ModelSection, Pretrained, StagedModel
from overproof.errors import InputError
from overproof.registry import FAMILIES

BLOCK = 32  # numbers that share a scale in most formats
PARTS = ("layers", "intermediate_size", "kv_heads", "hidden_size", "hidden_sizes")  # that a teacher can lose


@dataclass(frozen=True)
class Kept:
    """How much of its teacher a student keeps; None is all of it."""

    layers: int | None = None
    intermediate_size: int | None = None  # channels of each feed-forward layer
    kv_heads: int | None = None
    hidden_size: int | None = None  # channels between layers
    hidden_sizes: tuple[int, ...] | None = None  # channels of each stage of a convolutional teacher


@dataclass(frozen=True)
class Measurement:
    """What is found out about the teacher before students start from it: students of one measurement share it."""

    name: str  # of its file
    rows: int  # train rows, the first in training order


class OfTeacher(ModelSection):
    """A student that is made from its teacher: shape and weights follow from it."""

    @property
    @abstractmethod
    def kept(self) -> Kept:
        """What stays of the teacher."""

    @property
    def measurement(self) -> Measurement | None:
        """What must be known of the teacher; None where nothing is."""
        return None

    def further_steps(self, steps: int) -> tuple[int, ...]:
        """Those of a training of so many after which a further part goes."""
        del steps
        return ()

    def left_of(self, teacher: LayeredModel | StagedModel) -> LayeredModel | StagedModel:
        """The section of what is left of a teacher that a recipe describes.

        Raises:
            InputError: it cannot be made from that.
        """
        if isinstance(teacher, StagedModel):
            return teacher.narrowed(self.stages(f"a teacher of kind {teacher.kind}"))
        return self.left_of_layers(teacher)

    @abstractmethod
    def left_of_layers(self, teacher: LayeredModel) -> LayeredModel:
        """The same of a teacher of equal layers."""

    def stages(self, teacher: str) -> tuple[int, ...]:
        """Channels of each stage that stay, of a convolutional ``teacher``.

        Raises:
            InputError: it is not made from such.
        """
        raise InputError(
            f"kind {self.kind}: {teacher} has stages of blocks, and no equal layers; expected {{kind: pruned, "
            "hidden_sizes: ...}"
        )

    @abstractmethod
    def require_possible(self, layers: int, intermediate: int, kv_heads: int, hidden: int) -> None:
        """Look whether it can be made from a teacher with so many layers, channels of each feed-forward layer, key
        heads, and channels between layers.

        Raises:
            InputError: it cannot.
        """

    def require_linear(self, linear: bool, what: str) -> None:
        """Look whether it can be made from layers whose matrices are ``linear`` or are not.

        Raises:
            InputError: it cannot.
        """
        del linear, what


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
    def kept(self) -> Kept:
        return Kept(layers=self.count)

    def left_of_layers(self, teacher: LayeredModel) -> LayeredModel:
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


class Pruned(OfTeacher):
    """The teacher without what matters least on train rows: layers, channels of the feed-forward layers, key heads,
    channels between layers; of a convolutional teacher channels of its stages.

    Channels and heads matter by the size of what they give (arXiv 2407.14679), layers by how far they turn what they
    are given (arXiv 2403.03853), or by the loss without each. What is null stays as the teacher has it.
    """

    kind: Literal["pruned"] = "pruned"
    layers: Count | None = Field(None, description="Layers that stay.")
    intermediate_size: Count | None = Field(None, description="Channels of each feed-forward layer that stay.")
    kv_heads: Count | None = Field(None, description="Key heads of each layer that stay, with their query heads.")
    hidden_size: Count | None = Field(None, description="Channels between layers that stay.")
    hidden_sizes: Annotated[tuple[Count, ...], Field(min_length=1)] | None = Field(
        None, description="Channels of each stage that stay, of a convolutional teacher; inside blocks they follow."
    )
    layers_by: Literal["influence", "loss"] = Field(
        "influence",
        description="What says which layers stay: how far each turns what it is given, which one pass of the teacher "
        "tells; or the loss without it, which takes a pass for each.",
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
    def kept(self) -> Kept:
        return Kept(**{name: getattr(self, name) for name in PARTS})

    @property
    def measurement(self) -> Measurement:
        by = "" if self.layers_by == "influence" else f"-layers-by-{self.layers_by}"
        return Measurement(f"importance-of-{self.rows}-rows{by}", self.rows)

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
        others = [name for name in self.parts if name != "hidden_sizes"]
        if others or self.hidden_sizes is None:
            raise InputError(f"{others[0]}: {teacher} loses channels of its stages alone; expected hidden_sizes")
        if self.rounds > 1:
            raise InputError(f"rounds {self.rounds}: {teacher} loses channels of its stages at once; expected 1")
        return self.hidden_sizes

    def left_of_layers(self, teacher: LayeredModel) -> LayeredModel:
        """See ``OfTeacher``. Heads and channels between layers are refused: fresh heads follow from the width."""
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
    experimental: ClassVar[str] = "its files are no smaller and no faster than without zeros"
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
    def kept(self) -> Kept:
        return Kept()

    @property
    def measurement(self) -> Measurement:
        measure = "2-of-4" if self.sparsity is None else f"{self.sparsity!r}"
        return Measurement(f"{self.method}-{measure}-on-{self.rows}-rows", self.rows)

    def left_of_layers(self, teacher: LayeredModel) -> LayeredModel:
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
        if not linear:
            raise InputError(
                f"kind masked: found {what}, whose matrices are Conv1D or none; expected layers of nn.Linear, such as "
                "those of llama"
            )


StudentModel = Annotated[ModelSection, OneOf(FAMILIES, TeacherLayers, Pruned, Masked, Pretrained)]
