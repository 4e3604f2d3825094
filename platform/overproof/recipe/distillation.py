"""The sections that distil: the teacher's cache, students, the sweep."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from overproof.recipe.models import Llama, Vit
from overproof.recipe.section import Count, Cpus, Name, Section
from overproof.recipe.training import Optimization


class TopK(Section):
    """The largest log-probabilities of each position; a loss sums all others into one bucket."""

    kind: Literal["topk"] = "topk"
    k: Count = Field(32, description="Log-probabilities kept for each position.")

    @property
    def words(self) -> str:
        return f"{self.k} likeliest outputs"


class Sampled(Section):
    """Outputs drawn from the teacher: the gradient of forward KL stays that of every output, in the mean.

    Sparse Logit Sampling, arXiv 2503.16870.
    """

    kind: Literal["sampled"] = "sampled"
    draws: Annotated[int, Field(ge=1, lt=1 << 16)] = Field(32, description="Draws with replacement for each position.")

    @property
    def words(self) -> str:
        return f"{self.draws} drawn outputs"


class Dense(Section):
    """Every log-probability: what the other schemes are measured against, for small vocabularies."""

    kind: Literal["dense"] = "dense"

    @property
    def words(self) -> str:
        return "whole distribution"


Scheme = TopK | Sampled | Dense


class Cache(Section):
    """The teacher's targets, computed once and read by every trial."""

    scheme: Annotated[Scheme, Field(discriminator="kind")] = Field(
        TopK(), description="What is kept of the teacher's distribution."
    )
    temperatures: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (1.0,), min_length=1, description="Temperatures whose full-vocabulary logsumexp is kept."
    )
    rows: Count | None = Field(None, description="Rows covered, in training order; null covers every row.")
    batch_size: Count = Field(32, description="Rows in a forward pass.")
    actors: Count = Field(2, description="Teacher replicas in the actor pool.")
    cpus_per_actor: Cpus = Field(1, description="Logical CPUs reserved by each replica.")
    gpus_per_actor: float = Field(0, ge=0, description="GPUs reserved by each replica.")


class Student(Section):
    """One trial of the sweep."""

    name: Name
    model: Annotated[Llama | Vit, Field(discriminator="kind")]
    temperature: float = Field(1.0, gt=0, description="Softens both distributions (arXiv 1503.02531).")
    teacher_weight: float = Field(
        0.5, ge=0, le=1, description="Share of the teacher's loss; the rest is the labels' cross-entropy."
    )
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = Field(
        "forward_kl", description="The teacher's loss: KL from it, KL from the student, or a mixture of both."
    )
    jsd_beta: float = Field(0.5, gt=0, lt=1, description="Weight of the teacher in jsd (arXiv 2306.13649).")


class Sweep(Optimization):
    """Students distilled from the one cache, and a control: the best student trained without the teacher."""

    students: tuple[Student, ...] = Field(min_length=1)
    keep: Count = Field(2, description="Students exported at most: the best, and smaller ones at a higher loss.")
    concurrent_trials: Count = Field(2, description="Trials that run at the same time.")
    cpus_per_trial: Cpus = Field(1, description="Logical CPUs reserved by each trial.")
    gpus_per_trial: float = Field(0, ge=0, description="GPUs reserved by each trial.")

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [student.name for student in self.students]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"students share the name {twice[0]!r}; expected every name once")
        for name, whose in (("control", "the one trained without the teacher"), ("teacher", "the large model")):
            if name in names:
                raise ValueError(f"a student is named {name!r}, the name of {whose}; rename it")
        if self.steps == 0:
            raise ValueError("steps is 0; expected at least 1, since a student starts untrained")
        return self
