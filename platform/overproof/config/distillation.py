"""The recipe's sections for distillation: the teacher's text and cache, students, the sweep."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from overproof.config.base import RESOURCE, Count, Cpus, Identifier, Precision, Section
from overproof.config.student_models import OfTeacher, StudentModel
from overproof.config.training import Optimization, ZeroSettings


class TopK(Section):
    """The largest log-probabilities of each position; a loss sums all others into one bucket."""

    kind: Literal["topk"] = "topk"
    k: Count = Field(32, description="Log-probabilities kept for each position.")

    @property
    def description(self) -> str:
        return f"{self.k} likeliest outputs"


class Sampled(Section):
    """The likeliest outputs, and some drawn from the others: in the mean, the gradient of forward KL over every output.

    Random sampling after arXiv 2503.16870, of the tail alone.
    """

    kind: Literal["sampled"] = "sampled"
    k: Count = Field(2, description="Log-probabilities kept for each position.")
    draws: Count = Field(32, description="Outputs drawn from the others, for each position.")

    @property
    def description(self) -> str:
        return f"{self.k} likeliest and {self.draws} drawn outputs"


class Dense(Section):
    """Every log-probability: what the other schemes are measured against, for small vocabularies."""

    kind: Literal["dense"] = "dense"

    @property
    def description(self) -> str:
        return "whole distribution"


Scheme = TopK | Sampled | Dense


class Generate(Section):
    """Text that the teacher writes once, and students read in place of the train rows (arXiv 1606.07947)."""

    prompt_tokens: Count = Field(description="Tokens of a train row, from its start, that the teacher goes on from.")
    temperature: float = Field(1.0, ge=0, description="Of its sampling; 0 takes the likeliest token.")
    rows: Count | None = Field(None, description="Rows written, in training order; null writes every row.")
    batch_size: Count = Field(32, description="Rows written together.")
    precision: Precision = "fp32"
    actors: Annotated[Count, RESOURCE] = Field(2, description="Teacher replicas in the actor pool.")
    cpus_per_actor: Annotated[Cpus, RESOURCE] = Field(1, description="Logical CPUs reserved by each replica.")
    gpus_per_actor: Annotated[float, RESOURCE] = Field(0, ge=0, description="GPUs reserved by each replica.")


class Cache(Section):
    """The teacher's targets, computed once and read by every trial."""

    scheme: Annotated[Scheme, Field(discriminator="kind")] = Field(
        TopK(), description="What is kept of the teacher's distribution."
    )
    temperatures: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (1.0,), min_length=1, description="Temperatures whose full-vocabulary logsumexp is kept."
    )
    rows: Count | Literal["all"] | None = Field(
        None,
        description="Rows covered, in training order; null covers those that the sweep reads, or with `generate` those "
        "written.",
    )
    batch_size: Count = Field(32, description="Rows in a forward pass.")
    precision: Precision = "fp32"
    actors: Annotated[Count, RESOURCE] = Field(2, description="Teacher replicas in the actor pool.")
    cpus_per_actor: Annotated[Cpus, RESOURCE] = Field(1, description="Logical CPUs reserved by each replica.")
    gpus_per_actor: Annotated[float, RESOURCE] = Field(0, ge=0, description="GPUs reserved by each replica.")


class AttentionRelationLoss(Section):
    """Self-attention relations of the student's last layer, drawn to those of a teacher's layer (arXiv 2012.15828)."""

    heads: Count = Field(description="Relation heads; divides the queries' and keys' widths of both models.")
    weight: float = Field(gt=0, description="Added to the loss, times this: nats.")
    teacher_layer: int | None = Field(None, ge=0, description="Counted from 0; null is the last.")


class HiddenStateLoss(Section):
    """Hidden states of the student's last layer, drawn to a teacher's through a learned matrix (arXiv 1412.6550)."""

    weight: float = Field(gt=0, description="The mean squared difference is added to the loss, times this.")
    teacher_layer: int | None = Field(None, ge=0, description="Counted from 0; null is the last.")


TrainedRounding = Literal["q8_0", "q4_0", "int8"]


class Student(Section):
    """One trial of the sweep."""

    name: Identifier
    model: StudentModel = Field(description="Its shape, with fresh weights; or what gives it both.")
    temperature: float = Field(1.0, gt=0, description="Softens both distributions (arXiv 1503.02531).")
    teacher_weight: float = Field(
        0.5, ge=0, le=1, description="Share of the teacher's loss; the rest is the labels' cross-entropy."
    )
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = Field(
        "forward_kl", description="The teacher's loss: KL from it, KL from the student, or a mixture of both."
    )
    jsd_beta: float = Field(0.5, gt=0, lt=1, description="Weight of the teacher in jsd (arXiv 2306.13649).")
    teacher: Literal["cached", "live"] = Field(
        "cached", description="Its largest outputs, out of the cache; or all of them, computed at each step."
    )
    text: Literal["data", "teacher"] = Field(
        "data",
        description="Rows it trains on: the data's, or what the teacher wrote in their place: see generate.",
    )
    relations: AttentionRelationLoss | None = Field(
        None, description="Also learn from its attention; it then runs at each step."
    )
    states: HiddenStateLoss | None = Field(None, description="Also learn from its states; it then runs at each step.")
    on_policy: float = Field(
        0.0, ge=0, le=1, description="Share of the steps at which it learns from what it wrote itself: sweep.on_policy."
    )

    rounding: TrainedRounding | None = Field(
        None,
        description="It learns with its layers' matrices rounded as this variant of compress.formats has them "
        "(quantisation-aware distillation); its other variants are then the worse for it.",
    )

    @property
    def rounds(self) -> int:
        """In which its teacher is pruned."""
        return 1 + len(self.further_steps(1))

    def further_steps(self, steps: int) -> tuple[int, ...]:
        """Those of a training of so many after which it loses a further part."""
        return self.model.further_steps(steps) if isinstance(self.model, OfTeacher) else ()

    @property
    def distilled(self) -> bool:
        """Whether the teacher has any part in it."""
        return self.teacher_weight > 0 or self.on_policy > 0 or self.text == "teacher" or self.uses_features

    @property
    def uses_features(self) -> bool:
        """Whether it learns from features inside the teacher, which no cache holds."""
        return self.relations is not None or self.states is not None

    @property
    def reads_cache(self) -> bool:
        """Whether it learns from the cached outputs."""
        return self.teacher == "cached" and self.teacher_weight > 0

    @property
    def needs_live_teacher(self) -> bool:
        """Whether the teacher runs at each of its steps."""
        return self.uses_features or (self.teacher == "live" and self.teacher_weight > 0)


class OnPolicy(Section):
    """Students write after prompts, and one pool of teachers scores what all of them wrote (arXiv 2306.13649)."""

    prompt_tokens: Count = Field(description="Tokens of a train row, from its start, that a student goes on from.")
    new_tokens: Count = Field(description="Tokens it writes; the loss is over these.")
    k: Count = Field(32, description="Largest log-probabilities kept of each token; all of a smaller vocabulary.")
    rows: Count = Field(32, description="Rows in a teacher's forward pass; requests of several trials share one.")
    precision: Precision = "fp32"
    wait_s: Annotated[float, RESOURCE] = Field(
        0.02, ge=0, description="Most seconds that a request waits for others to fill the pass."
    )
    actors: Annotated[Count, RESOURCE] = Field(1, description="Teacher replicas in the pool.")
    cpus_per_actor: Annotated[Cpus, RESOURCE] = Field(1, description="Logical CPUs reserved by each replica.")
    gpus_per_actor: Annotated[float, RESOURCE] = Field(0, ge=0, description="GPUs reserved by each replica.")


class DataParallel(ZeroSettings):
    """Workers that train one student together, under Ray Train, where one process is not enough; or one that trains it
    as they do, with ZeRO's offload or in 16 bits."""

    workers: Annotated[Count, RESOURCE] = Field(2, description="Training processes of each trial.")

    @model_validator(mode="after")
    def _workers_fit(self) -> Self:
        self.require_whole_partitions(self.workers)
        return self


class Sweep(Optimization):
    """Students distilled from one cache, and controls: the same students trained without the teacher."""

    students: tuple[Student, ...] = Field(min_length=1)
    keep: Count = Field(2, description="Students exported at most: the best, and smaller ones at a higher loss.")
    controls: Literal["best", "every"] = Field(
        "best", description="Which students have a control: the best one, or every one that runs all steps."
    )
    on_policy: OnPolicy | None = Field(
        None, description="What students with a share on_policy write, and the teachers that score it."
    )
    precision: Precision = "fp32"
    concurrent_trials: Annotated[Count, RESOURCE] = Field(2, description="Trials that run at the same time.")
    cpus_per_trial: Annotated[Cpus, RESOURCE] = Field(1, description="Logical CPUs reserved by each trial.")
    gpus_per_trial: Annotated[float, RESOURCE] = Field(0, ge=0, description="GPUs reserved by each trial.")
    group: DataParallel | None = Field(
        None, description="Train each student by several workers, which reserve their own CPUs and GPUs."
    )

    @property
    def bundles(self) -> tuple[int, float, float]:
        """What a trial reserves: how many bundles, each within one node, and the CPUs and GPUs of each."""
        if self.group:
            return self.group.workers, self.group.cpus_per_worker, self.group.gpus_per_worker
        return 1, self.cpus_per_trial, self.gpus_per_trial

    @property
    def live_precision(self) -> Precision:
        """Of a teacher that runs beside a student: the student's, but for fp16, which needs a scale for its loss."""
        found = self.group.precision if self.group else self.precision
        return "fp32" if found == "fp16" else found

    @property
    def teacher_pool(self) -> OnPolicy | None:
        """The settings of the teachers that score what students write, where some student does."""
        return self.on_policy if any(student.on_policy for student in self.students) else None

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [student.name for student in self.students]
        duplicates = sorted({name for name in names if names.count(name) > 1})
        if duplicates:
            raise ValueError(f"students share the name {duplicates[0]!r}; expected every name once")
        for name in names:
            if name in ("control", "teacher") or name.startswith("control-"):
                raise ValueError(f"a student is named {name!r}, as another model of the sweep is; rename it")
        writer = next((student.name for student in self.students if student.on_policy), None)
        if writer and self.on_policy is None:
            raise ValueError(f"student {writer} has a share on_policy; expected a section on_policy in the sweep")
        if self.steps == 0:
            raise ValueError("steps is 0; expected at least 1, since a student starts untrained")
        for student in self.students:
            if student.rounds > 1 and student.uses_features:
                raise ValueError(
                    f"student {student.name} learns from features, whose widths model.rounds changes as it trains; "
                    "expected model.rounds: 1, or no relations and states"
                )
        return self

    @model_validator(mode="after")
    def _group_fits(self) -> Self:
        if self.group is None:
            return self
        if self.precision != "fp32":
            raise ValueError(
                f"precision is {self.precision!r}, of students that one process trains; expected group.precision"
            )
        if self.batch_size % self.group.workers:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of group.workers {self.group.workers}; every worker "
                "takes an equal share"
            )
        for student in self.students:
            if student.rounds > 1:
                raise ValueError(
                    f"student {student.name} is pruned in {student.rounds} rounds, as one process alone trains it; "
                    "expected no group, or model.rounds: 1"
                )
            unsupported = {"relations": student.relations, "states": student.states, "on_policy": student.on_policy}
            if field := next((name for name, value in unsupported.items() if value), None):
                raise ValueError(
                    f"student {student.name} has {field}, which one process alone can learn from; expected no group"
                )
        return self
