"""What a plan tells of a recipe that can run, and warns of: one `Finding` for each check. Nothing here prints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from overproof.artifacts import Store
from overproof.config import Pretrained, Recipe
from overproof.config.search import Asha, Choice, Hyperband, Median, Pbt
from overproof.data.source_files import describe_skipped
from overproof.engines.base import ScoringLoader
from overproof.errors import InputError
from overproof.files import join_uri
from overproof.registry import ENGINES, TASKS
from overproof.tasks.base import TokenTask
from overproof.units import format_bytes, format_count, format_seconds

HIGH_RATE = 0.1  # of AdamW, for models that begin with random weights; a tenth of it for others


@dataclass(frozen=True)
class Finding:
    """One line of the plan."""

    about: str
    state: Literal["ok", "warning", "refused"]
    text: str


@dataclass(frozen=True)
class Throughput:
    """Predictions in a second, and how that is known."""

    per_s: float
    source: str


def check_source(recipe: Recipe) -> Iterator[Finding]:
    """How many files the data come from, and a warning of those that are left out.

    Raises:
        InputError: there are none.
    """
    listing = TASKS[recipe.data.kind].source_files(recipe.data)
    if listing.files:
        size = format_bytes(sum(file.size_bytes for file in listing.files))
        yield Finding("data", "ok", f"{format_count(len(listing.files), 'file')}, {size}")
    for line in describe_skipped(listing.skipped):
        yield Finding("data", "warning", line)


def warn_not_smaller(sizes: Mapping[str, int], teacher: int) -> Iterator[Finding]:
    """A warning for each student that is no smaller than its teacher."""
    for name, size_ in sizes.items():
        if size_ >= teacher:
            yield Finding(
                f"student {name}", "warning", f"{size_:,} parameters are not fewer than the teacher's {teacher:,}"
            )


def warn_for_study(recipe: Recipe) -> Iterator[Finding]:
    """A warning for each student that is experimental."""
    for student in recipe.sweep.students:
        if what := student.model.experimental:
            text = f"kind {student.model.kind} is experimental, for study: {what}"
            yield Finding(f"student {student.name}", "warning", text)


def check_gate(recipe: Recipe) -> Iterator[Finding]:
    """A warning where a file of any quality could pass."""
    quality = TASKS[recipe.data.kind].quality
    if not recipe.gate.bounds_quality(quality.higher_is_better, quality.relative):
        yield Finding(
            "gate", "warning",
            f"no rule holds a file's {quality.title} close to the teacher's, or to a figure: one far worse than "
            "the teacher could ship. Add {kind: keep, against: teacher, at_least: 0.97} to gate.rules, or {kind: "
            "quality, limit: ...}",
        )  # fmt: skip


def check_precision(recipe: Recipe) -> Iterator[Finding]:
    """A warning for each stage that may compute in bf16 on CPUs.

    Raises:
        InputError: the recipe says how torch scores files, and their engine scores them itself.
    """
    train, sweep, evaluate, engine = recipe.train, recipe.sweep, recipe.evaluate, ENGINES[recipe.engine]
    if not isinstance(TASKS[recipe.data.kind], TokenTask) or isinstance(engine, ScoringLoader):
        for field in ("precision", "gpus_per_task"):
            found = getattr(evaluate, field)
            if found != type(evaluate).model_fields[field].default:
                raise InputError(
                    f"evaluate.{field}: found {found!r}; {recipe.engine} scores its files itself, on CPUs: leave it out"
                )
    asked: dict[str, tuple[str, float]] = {"train": (train.precision, train.gpus_per_worker)}
    for name, pool in (("generate", recipe.generate), ("cache", recipe.cache if recipe.reads_cache else None)):
        if pool is not None:
            asked[name] = pool.precision, pool.gpus_per_actor
    if sweep.group is not None:
        asked["sweep.group"] = sweep.group.precision, sweep.group.gpus_per_worker
    else:
        asked["sweep"] = sweep.precision, sweep.gpus_per_trial
    if sweep.teacher_pool is not None:
        asked["sweep.on_policy"] = sweep.teacher_pool.precision, sweep.teacher_pool.gpus_per_actor
    asked["evaluate"] = evaluate.precision, evaluate.gpus_per_task
    for name, (precision, gpus) in asked.items():
        if precision == "bf16" and not gpus:
            yield Finding(
                f"{name}.precision", "warning",
                "bf16 without a GPU: CPUs with neither avx512_bf16 nor amx_bf16 take many times as long as in fp32",
            )  # fmt: skip


def check_learning_rates(recipe: Recipe) -> Iterator[Finding]:
    """A warning for each rate at which AdamW hardly ever learns."""
    given = {"train.learning_rate": recipe.train.learning_rate if recipe.train.steps else 0.0}
    searched = recipe.tune.space.learning_rate
    if searched is None:
        given["sweep.learning_rate"] = recipe.sweep.learning_rate
    else:
        given["tune.space.learning_rate"] = max(searched.values) if isinstance(searched, Choice) else searched.high
    for field, rate in given.items():
        goes_on = field == "train.learning_rate" and isinstance(recipe.train.model, Pretrained)
        most, usual = (HIGH_RATE / 10, "1e-5 to 3e-4") if goes_on else (HIGH_RATE, "1e-4 to 1e-2")
        if rate > most:
            yield Finding(field, "warning", f"{rate:g} is far above what models learn with: {usual} is usual")


def check_first_comparison(recipe: Recipe) -> Iterator[Finding]:
    """A warning where no trial is compared with others before its end, so that none is stopped early."""
    steps = recipe.sweep.steps
    match recipe.tune.scheduler:
        case Pbt(interval_steps=given):
            field = "interval_steps"
        case Asha(grace_steps=given) | Median(grace_steps=given) | Hyperband(grace_steps=given):
            field = "grace_steps"
        case _:
            return
    if given is not None and given >= steps:
        yield Finding(
            f"tune.scheduler.{field}", "warning",
            f"{given:,}, and trials end after sweep.steps, {steps:,}: they are first compared then, and none is "
            "stopped before; give fewer, or leave it out",
        )  # fmt: skip


def measured_rate(recipe: Recipe) -> Throughput | None:
    """The rate at which this recipe's newest teacher of the same model trained, out of its record."""
    model = recipe.train.model.model_dump(mode="json")
    with suppress(InputError, OSError):
        for artifact in reversed(Store(join_uri(Store(recipe.store).uri, recipe.name)).artifacts()):
            record = artifact.record
            if record.stage != "train" or record.config["train"]["model"] != model:
                continue
            metrics = record.metrics
            steps, seconds = metrics.get("steps"), metrics.get("seconds_per_step")
            predictions = metrics.get(f"{TASKS[recipe.data.kind].unit}s")
            if steps and seconds and predictions:
                return Throughput(predictions / steps / seconds, f"measured by {artifact.id}")
    return None


def training_time(recipe: Recipe, rate: Throughput | None, positions: int) -> Finding:
    """How long the teacher trains, of rows with so many predictions."""
    unit = f"{TASKS[recipe.data.kind].unit}s"
    flag = "--tokens-per-s" if unit == "tokens" else "--rows-per-s"
    steps = recipe.train.steps
    if steps == 0:
        return Finding("time", "ok", "the teacher is taken as it is: it is not trained")
    total = steps * recipe.train.batch_size * positions
    work = f"{total:,} {unit} in {format_count(steps, 'step')}"
    if rate is None:
        few = f"`overproof train RECIPE --set train.steps=20 --set store={Path('trial')}`"
        return Finding(
            "time", "ok", f"{work}; give {flag} N for the hours, or measure: {few}, then plan with that store"
        )
    return Finding(
        "time", "ok", f"{work} at {rate.per_s:,.0f} {unit}/s ({rate.source}): {format_seconds(total / rate.per_s)}"
    )
