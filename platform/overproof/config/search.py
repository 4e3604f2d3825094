"""What a sweep searches: domains, how values are suggested, and how trials are stopped."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from math import prod
from typing import Annotated, Any, Generic, Literal, Self, TypeVar

from pydantic import Field, ValidationError, model_validator

from overproof.config.base import Count, Section
from overproof.config.distillation import Student, Sweep, TrainedRounding
from overproof.config.training import Optimization

MOST_SHAPES = 100_000  # combinations that are looked at one by one
# What may change while a trial goes on.
CHANGEABLE = (
    "learning_rate", "final_fraction", "weight_decay", "beta1", "beta2", "clip_norm", "temperature", "teacher_weight",
    "jsd_beta",
)  # fmt: skip
T = TypeVar("T")
TrialValues = dict[str, Any]  # of one trial, by the space's fields; "student" is the base where there are several


GRACE = "Steps every trial runs before it may be stopped; null: sweep.validate_every."


class Choice(Section, Generic[T]):
    """One of the values listed."""

    kind: Literal["choice"] = "choice"
    values: tuple[T, ...] = Field(min_length=1, description="What there is to choose from.")

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        twice = next((value for place, value in enumerate(self.values) if value in self.values[:place]), None)
        if twice is not None:
            raise ValueError(f"values has {twice} twice; expected each once")
        return self


class Span(Section):
    """From low to high."""

    low: float = Field(description="Least value.")
    high: float = Field(description="Largest value.")

    @model_validator(mode="after")
    def _ascends(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low {self.low:g} is not below high {self.high:g}")
        return self


class Uniform(Span):
    """A number from a range, each as likely."""

    kind: Literal["uniform"] = "uniform"


class LogUniform(Span):
    """A number from a range, each order of magnitude as likely."""

    kind: Literal["log_uniform"] = "log_uniform"
    low: float = Field(gt=0, description="Least value.")


class Integers(Span):
    """A whole number from a range: low, low + step, and so on up to high."""

    kind: Literal["integers"] = "integers"
    low: int = Field(description="Least value.")
    high: int = Field(description="Largest value.")
    step: Count = Field(1, description="Distance between values.")

    @model_validator(mode="after")
    def _whole_steps(self) -> Self:
        if (self.high - self.low) % self.step:
            raise ValueError(f"high {self.high} is not low {self.low} plus a multiple of step {self.step}")
        return self

    @property
    def values(self) -> tuple[int, ...]:
        return tuple(range(self.low, self.high + 1, self.step))


RealDomain = Annotated[Uniform | LogUniform | Choice[float], Field(discriminator="kind")]
IntegerDomain = Annotated[Integers | Choice[int], Field(discriminator="kind")]
Domain = Uniform | LogUniform | Integers | Choice[Any]


class Space(Section):
    """What differs from trial to trial; whatever is not named here is as in the sweep and its students."""

    steps: IntegerDomain | None = Field(None, description="Optimizer steps; scheduler.kind is then none.")
    learning_rate: RealDomain | None = Field(None, description="Peak rate.")
    batch_size: IntegerDomain | None = Field(None, description="Rows in a batch.")
    warmup_steps: IntegerDomain | None = Field(None, description="Steps of linear warm-up.")
    schedule: Choice[str] | None = Field(None, description="Shapes after warm-up.")
    final_fraction: RealDomain | None = Field(None, description="Last rate as a share of the peak.")
    weight_decay: RealDomain | None = Field(None, description="Decoupled decay of matrices.")
    beta1: RealDomain | None = Field(None, description="Decay of the gradient average.")
    beta2: RealDomain | None = Field(None, description="Decay of the squared-gradient average.")
    clip_norm: RealDomain | None = Field(None, description="Largest global gradient norm.")
    temperature: Choice[float] | None = Field(None, description="Temperatures; cache.temperatures must have them.")
    teacher_weight: RealDomain | None = Field(None, description="Share of the teacher's loss; 0 is plain training.")
    divergence: Choice[str] | None = Field(None, description="Losses of the teacher.")
    jsd_beta: RealDomain | None = Field(None, description="Weight of the teacher in jsd.")
    rounding: Choice[TrainedRounding | None] | None = Field(
        None, description="Variants in whose numbers students learn; null in the list is as they are."
    )
    hidden_size: IntegerDomain | None = Field(None, description="Width of the residual stream.")
    hidden_sizes: Choice[tuple[int, ...]] | None = Field(None, description="Channels of each stage.")
    intermediate_size: IntegerDomain | None = Field(None, description="Width of the feed-forward layer.")
    layers: IntegerDomain | None = Field(None, description="Layers.")
    heads: IntegerDomain | None = Field(None, description="Attention heads.")
    kv_heads: IntegerDomain | None = Field(None, description="Key and value heads.")

    @property
    def domains(self) -> dict[str, Domain]:
        """Those that are named, by field."""
        return {name: domain for name in Space.model_fields if (domain := getattr(self, name)) is not None}


class Grid(Section):
    """Every combination, once."""

    kind: Literal["grid"] = "grid"


class Random(Section):
    """Values drawn at random."""

    kind: Literal["random"] = "random"
    trials: Count = Field(description="Trials in all; no more than the space has combinations.")


class Tpe(Section):
    """Tree-structured Parzen estimator (Bergstra et al. 2011; multivariate, arXiv 2304.11127), by Optuna."""

    kind: Literal["tpe"] = "tpe"
    trials: Count = Field(description="Trials in all; no more than the space has combinations.")
    startup_trials: Count = Field(5, description="Trials drawn at random before the first is suggested.")


class NoStop(Section):
    """Every trial runs every step."""

    kind: Literal["none"] = "none"


class Asha(Section):
    """Asynchronous successive halving (arXiv 1810.05934)."""

    kind: Literal["asha"] = "asha"
    grace_steps: Count | None = Field(None, description=GRACE)
    reduction_factor: int = Field(2, ge=2, description="One trial in this many goes on at each rung.")


class Median(Section):
    """A trial stops where its best loss is worse than the median of the others' averages (Vizier, 2017)."""

    kind: Literal["median"] = "median"
    grace_steps: Count | None = Field(None, description=GRACE)
    least_trials: Count = Field(3, description="Others that must have come as far.")


class Hyperband(Section):
    """Asynchronous HyperBand: ASHA in several brackets at once, each with a longer grace period (arXiv 1810.05934)."""

    kind: Literal["hyperband"] = "hyperband"
    grace_steps: Count | None = Field(None, description=f"{GRACE} Later brackets wait longer.")
    reduction_factor: int = Field(3, ge=2, description="One trial in this many goes on at each rung.")
    brackets: int = Field(3, ge=2, description="Brackets; each waits reduction_factor times longer than the last.")


class Pbt(Section):
    """Population-based training (arXiv 1711.09846): the worst take on weights and, changed, settings of the best."""

    kind: Literal["pbt"] = "pbt"
    interval_steps: Count | None = Field(None, description="Steps between comparisons; null: sweep.validate_every.")
    quantile: float = Field(0.25, gt=0, le=0.5, description="Share of the trials that is given up for the best.")


Search = Annotated[Grid | Random | Tpe, Field(discriminator="kind")]
Scheduler = Annotated[NoStop | Asha | Median | Hyperband | Pbt, Field(discriminator="kind")]


def first_comparison(scheduler: Asha | Median | Hyperband | Pbt, sweep: Optimization) -> int:
    """Steps of a trial after which it is first compared with others."""
    given = scheduler.interval_steps if isinstance(scheduler, Pbt) else scheduler.grace_steps
    return min(given or sweep.validate_every, sweep.steps)


SearchObjective = Literal["validation_loss", "parameters", "seconds"]


class Tune(Section):
    """The search over students: without a space, the students themselves are the trials."""

    space: Space = Space()
    search: Search = Grid()
    scheduler: Scheduler = NoStop()
    objectives: tuple[SearchObjective, ...] = Field(
        ("validation_loss",),
        min_length=1,
        description="What is made small; several at once are searched for their trade-offs.",
    )

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if isinstance(self.search, Grid):
            for name, domain in self.space.domains.items():
                if isinstance(domain, Uniform | LogUniform):
                    raise ValueError(
                        f"space.{name}: a grid has no end in a {domain.kind} range; list values with kind choice, or "
                        "set search.kind to random or tpe"
                    )
        if "validation_loss" not in self.objectives or len(set(self.objectives)) < len(self.objectives):
            raise ValueError(
                f"objectives {list(self.objectives)}; expected validation_loss and others beside it, each once"
            )
        if len(self.objectives) > 1 and self.scheduler.kind != "none":
            raise ValueError(
                f"scheduler {self.scheduler.kind} compares validation losses alone and would stop what is small; "
                f"with objectives {list(self.objectives)} set scheduler.kind to none"
            )
        if self.space.steps is not None and self.scheduler.kind not in ("none", "pbt"):
            raise ValueError(
                f"scheduler {self.scheduler.kind} compares trials at the same step, where those of fewer steps are "
                "nearer to their end; with space.steps set scheduler.kind to none"
            )
        if isinstance(self.scheduler, Pbt):
            fixed = next((name for name in self.space.domains if name not in CHANGEABLE), None)
            if fixed or not self.space.domains:
                raise ValueError(
                    f"scheduler pbt changes settings while trials go on, and space names {fixed or 'none'}; expected "
                    f"some of {', '.join(CHANGEABLE)} and no others"
                )
        return self

    def trials(self, sweep: Sweep) -> int:
        """Trials in all: no more than there are combinations, for none is tried twice."""
        finite = self._finite()
        combinations = len(sweep.students) * prod(map(len, finite.values()))
        if isinstance(self.search, Grid):
            return combinations
        return self.search.trials if len(finite) < len(self.space.domains) else min(self.search.trials, combinations)

    def most_steps(self, sweep: Sweep) -> int:
        """Of any trial."""
        searched = self.space.steps
        return sweep.steps if searched is None else max(searched.values)

    def least_steps(self, sweep: Sweep) -> int:
        """Of any trial."""
        searched = self.space.steps
        return sweep.steps if searched is None else min(searched.values)

    def min_concurrent(self, sweep: Sweep) -> int:
        """Trials that must run at the same time."""
        return self.trials(sweep) if isinstance(self.scheduler, Pbt) else 1

    def grid(self, sweep: Sweep) -> Iterator[TrialValues]:
        """Every combination of listed values, the students outermost."""
        finite = self._finite()
        for student, *chosen in product((student.name for student in sweep.students), *finite.values()):
            yield {"student": student, **dict(zip(finite, chosen, strict=True))}

    def _finite(self) -> dict[str, tuple[Any, ...]]:
        return {n: d.values for n, d in self.space.domains.items() if not isinstance(d, Uniform | LogUniform)}

    def check(self, sweep: Sweep) -> None:
        """Refuse a space of which some trial could not be.

        Raises:
            ValueError: a field that a student's model does not have, or values that contradict it or each other.
        """
        domains = self.space.domains
        if isinstance(self.scheduler, Pbt):
            if sweep.group:
                raise ValueError("tune.scheduler pbt hands weights from process to process; expected no sweep.group")
            if any(student.rounds > 1 for student in sweep.students):
                raise ValueError("tune.scheduler pbt hands weights from trial to trial; expected model.rounds: 1")
            if any(student.model != sweep.students[0].model for student in sweep.students):
                raise ValueError("tune.scheduler pbt hands weights from trial to trial: students need the same model")
            if self.trials(sweep) > sweep.concurrent_trials:
                raise ValueError(
                    f"tune.scheduler pbt compares trials as they go: {self.trials(sweep)} trials must run at the same "
                    f"time, and sweep.concurrent_trials is {sweep.concurrent_trials}; raise it, or ask for fewer"
                )
        least, field = self.least_steps(sweep), "sweep" if self.space.steps is None else "the least of tune.space"
        for student in sweep.students:
            if student.rounds > least:
                raise ValueError(
                    f"student {student.name}: model.rounds is {student.rounds}, and {field}.steps {least}; expected no "
                    "more rounds than steps"
                )
            absent = next((name for name in domains if not _has_field(student, name)), None)
            if absent:
                raise ValueError(f"tune.space.{absent}: the model of student {student.name} has no such field")
            for name, domain in domains.items():
                ends = (domain.low, domain.high) if isinstance(domain, Uniform | LogUniform) else domain.values
                if name not in type(student.model).model_fields:
                    for value in ends:
                        _require_valid(sweep, student, {name: value})
            shapes = {n: v for n, v in self._finite().items() if n in type(student.model).model_fields}
            if prod(map(len, shapes.values())) > MOST_SHAPES:
                raise ValueError(f"tune.space: more than {MOST_SHAPES:,} shapes of models; list fewer")
            for chosen in product(*shapes.values()):
                _require_valid(sweep, student, dict(zip(shapes, chosen, strict=True)))


def _has_field(student: Student, name: str) -> bool:
    return name in Sweep.model_fields or name in Student.model_fields or name in type(student.model).model_fields


def _require_valid(sweep: Sweep, student: Student, values: TrialValues) -> None:
    try:
        apply_values(sweep, student, values)
    except ValidationError as error:
        found = ", ".join(f"{name} {value}" for name, value in values.items())
        why = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ValueError(
            f"tune.space: student {student.name} with {found} cannot be: {why}; expected values that all go together"
        ) from None


def apply_values(sweep: Sweep, student: Student, values: TrialValues) -> tuple[Sweep, Student]:
    """The settings and the student of a trial.

    Raises:
        ValidationError: they contradict each other.
    """
    model = {name: value for name, value in values.items() if name in type(student.model).model_fields}
    own = {name: value for name, value in values.items() if name in Student.model_fields}
    others = {name: value for name, value in values.items() if name in Sweep.model_fields}
    shaped = type(student.model).model_validate(student.model.model_dump() | model)
    changed = Student.model_validate(student.model_dump() | {"model": shaped.model_dump()} | own)
    return Sweep.model_validate(sweep.model_dump() | others), changed


def current_values(sweep: Sweep, student: Student) -> TrialValues:
    """Every setting of a trial that a space may name, whether this one does or not."""
    places = (sweep, student, student.model)
    held = {name: getattr(place, name) for place in places for name in type(place).model_fields}
    return {name: held[name] for name in Space.model_fields if name in held}


def varying_values(sweep: Sweep, tune: Tune) -> frozenset[str]:
    """The settings in which trials of a sweep, or a trial and its control, may differ."""
    held = [current_values(sweep, student) for student in sweep.students]
    names = {name for values in held for name in values}
    differ = {name for name in names if any(values.get(name) != held[0].get(name) for values in held)}
    return frozenset({*differ, *tune.space.domains, "teacher_weight"})
