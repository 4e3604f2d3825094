"""From a model, data and a budget to a recipe: which task it is, and what is chosen, each with a reason."""

from __future__ import annotations

import math
import re
import shlex
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import yaml

from overproof.cluster import ray_cluster
from overproof.cluster.machine import available_cpus
from overproof.config import Recipe
from overproof.data.source_files import describe_skipped
from overproof.errors import InputError
from overproof.registry import FAMILIES, FORMATS, TASKS
from overproof.shrink import template
from overproof.shrink.given_model import GivenModel, inspect_model
from overproof.shrink.students import WHOLE, ChosenStudents, choose_students, teacher_section
from overproof.shrink.template import Schedule, TemplateSettings
from overproof.tasks.recognition import ColumnFlags, DataLook, Fit, Misfit, Question, Recognised, Shrinkable, look_at
from overproof.units import format_count, format_number

FEW_UNITS = 2000  # documents, images or rows: fewer give larger shares to validation and test
LARGE_ROWS, SMALL_ROWS = 20_000, 500  # train rows from which on there are several shards; below which groups are small
COMMENT_WIDTH = 118
NAME_LENGTH = 56
AT_ONCE = 2  # trials, and teachers that fill the cache, as recipes have it
TEACHER_WEIGHT = 0.8  # of the students' loss; the rest is the labels'


@dataclass(frozen=True)
class Asked:
    """What the command line says."""

    data: str
    model: str | None = None  # a directory; None where a teacher is to be trained
    task: str | None = None
    max_mb: float | None = None
    max_p95_ms: float | None = None
    keep: float = 0.97
    finetune: int | None = None  # steps of the teacher before it teaches
    max_minutes: float | None = None  # that all may take, about
    name: str | None = None
    flags: ColumnFlags = field(default_factory=ColumnFlags)
    overrides: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        """As it was typed, for the recipe's first lines."""
        words = [self.model or "-", "--data", self.data]
        options: dict[str, Any] = {
            "task": self.task, "max-mb": self.max_mb, "max-p95-ms": self.max_p95_ms, "keep": self.keep,
            "finetune": self.finetune, "max-minutes": self.max_minutes, "name": self.name,
        }  # fmt: skip
        for flag, value in options.items():
            if value is not None:
                words += [f"--{flag}", f"{value:g}" if isinstance(value, float) else str(value)]
        for flag, value in self.flags.given.items():
            words += [word for each in (value if isinstance(value, tuple) else (value,)) for word in (flag, str(each))]
        for override in self.overrides:
            words += ["--set", override]
        return shlex.join(words)


@dataclass(frozen=True)
class ProposedRecipe:
    """The recipe, as text and as what it says; and the reasons, by what was chosen."""

    recipe: Recipe
    text: str
    reasons: Mapping[str, str]
    students: ChosenStudents
    rows: int  # about how many the data have
    units: int  # documents, images or rows that these are

    @property
    def rows_per_unit(self) -> float:
        """More than one where documents fill several."""
        return self.rows / self.units


SKIPS = "data.on_error=skip"  # over what a template says


@dataclass(frozen=True)
class Found:
    """The model, and the task that the data are for."""

    given: GivenModel | None
    task: str
    fit: Fit


def find(asked: Asked) -> Found:
    """Look at the model and the data.

    Raises:
        InputError: something is missing, cannot be used, or must be said by a flag.
    """
    _check_budget(asked)
    given = inspect_model(asked.model) if asked.model is not None else None
    look = look_at(asked.data, "skip" if SKIPS in asked.overrides else "fail")
    return Found(given, *find_task(asked, given, look))


def _check_budget(asked: Asked) -> None:
    limits = {"--max-mb": asked.max_mb, "--max-p95-ms": asked.max_p95_ms, "--max-minutes": asked.max_minutes}
    for flag, value in limits.items():
        if value is not None and not 0 < value < float("inf"):
            raise InputError(f"{flag}: found {value:g}; expected a number above 0")
    if not 0 < asked.keep <= 1:
        raise InputError(f"--keep: found {asked.keep:g}; expected a share of up to 1, such as 0.97")
    if asked.finetune is not None and (asked.finetune < 1 or asked.model is None):
        why = "there is no MODEL to go on from" if asked.model is None else "expected at least 1 step"
        raise InputError(f"--finetune: found {asked.finetune}; {why}")


def find_task(asked: Asked, given: GivenModel | None, look: DataLook) -> tuple[str, Fit]:
    """The one task that both the model and the data are for.

    Raises:
        InputError: there is none, or several; or a task asks for something first.
    """
    kinds = [asked.task] if asked.task else list(TASKS)
    if given is not None:
        fitting = [kind for kind in kinds if kind in given.tasks]
        if not fitting:
            raise InputError(
                f"--task {asked.task}: MODEL {given.path} is a {given.family} model, for {' or '.join(given.tasks)}"
            )
        kinds = fitting
    tasks = {kind: TASKS[kind] for kind in kinds}
    config = given.config if given else None
    found: dict[str, Recognised] = {
        kind: task.recognise(look, config, asked.flags)
        if isinstance(task, Shrinkable)
        else Misfit("has no template yet: write a recipe")
        for kind, task in tasks.items()
    }
    fits = {kind: result for kind, result in found.items() if isinstance(result, Fit)}
    misfits = "".join(f"\n  {kind}: {result.why}" for kind, result in found.items() if isinstance(result, Misfit))
    if len(fits) == 1:
        ((kind, fit),) = fits.items()
        _refuse_unused(asked.flags, kind, fit, misfits)
        return kind, fit
    if fits:
        which = "; ".join(f"{kind}: {', '.join(fit.reasons.values())}" for kind, fit in fits.items())
        raise InputError(f"--task: the data may be for {' or '.join(fits)}; give the one you mean ({which})")
    questions = {result.flag: result.text for result in found.values() if isinstance(result, Question)}
    if questions:
        others = f"\nwhat other tasks lack:{misfits}" if misfits else ""
        raise InputError("\n".join(f"{flag}: {text}" for flag, text in questions.items()) + others)
    raise InputError(f"--data {look.path}: is for no task that fits{' this model' if given else ''}:{misfits}")


def _refuse_unused(flags: ColumnFlags, kind: str, fit: Fit, misfits: str) -> None:
    """Raises InputError where a flag was given that has no say in what was found: it was meant for something else."""
    for flag, value in flags.given.items():
        if flag not in fit.flags:
            others = f"; what other tasks lack:{misfits}" if misfits else ""
            shown = " ".join(value) if isinstance(value, tuple) else repr(value)
            raise InputError(f"{flag}: found {shown}, which {kind} of these data does not use: leave it out{others}")


def write(asked: Asked, found: Found, share: float = 1.0) -> ProposedRecipe:
    """A recipe for what was found, with a share of the steps that its template would have; a teacher that is trained
    has the share's root.

    Raises:
        InputError: the model cannot be written as the task needs, or no student is within the budget.
    """
    given, kind, fit = found.given, found.task, found.fit
    task: Any = TASKS[kind]
    settings = template.read_settings(task.template, fit.values)
    teacher = teacher_section(settings, given)
    values = _layout(fit) | {
        "name": template.flow(asked.name or _name(asked)),
        "task": kind,
        "data": template.block(fit.data, indent=2),
        "tokenizer": template.flow(given.path if given else ""),
        "teacher": template.flow(teacher.model_dump(mode="json")),
        "keep": settings.keep,
    }
    values |= _cpus() | {name: value for name, value in fit.values.items() if value is not None}
    values |= _schedule(asked, given, fit, settings, share)
    # A first draft, without students, says what the data's shape is and what the format writes.
    blank = values | {"students": "    []", "formats": "[]", "rules": "    - {}"}
    draft_text = template.render(task.template, blank)
    for override in asked.overrides:
        if re.match(r"data[.=]", override):
            draft_text = template.change(draft_text, override)
    draft = yaml.safe_load(draft_text)
    data = task.section.parse(draft["data"], "data")
    shape = task.shape(data)
    format = FORMATS[draft["compress"]["kind"]]
    family = given.family if given else teacher.kind
    if family not in format.families:
        named = given.config["architectures"][0] if given else family
        raise InputError(f"MODEL: {named} cannot be written as {draft['compress']['kind']}, as {kind} needs")
    variants = [variant for variant in settings.bytes if variant != format.unquantised]
    if FAMILIES[family].section is None:  # which the format's own tools write, and do not calibrate
        variants = [variant for variant in variants if "-" not in variant]
    chosen = choose_students(settings, teacher, given, shape, asked.max_mb, variants)
    tested = round(fit.units * values["test_fraction"])
    tested = min(tested, draft.get("evaluate", {}).get("max_documents") or tested)
    reasons = _reasons(asked, given, kind, fit, values, chosen, tested, share)
    if skipped := describe_skipped(task.source_files(data).skipped):
        reasons["files"] = "; ".join(skipped)
    values |= {
        "students": _students(chosen),
        "formats": template.flow(list(chosen.variants)),
        "rules": _rules(asked, settings, task.quality.title),
    }
    text = _header(asked, reasons) + template.render(task.template, values)
    for override in asked.overrides:
        text = template.change(text, override)
    return ProposedRecipe(Recipe.parse(yaml.safe_load(text), "recipe"), text, reasons, chosen, fit.rows, fit.units)


def _name(asked: Asked) -> str:
    """Of the run: after the model, or else the data."""
    given = asked.model or asked.data
    path = PurePath(given.partition("?")[0]) if "://" in given else Path(given).absolute()
    words = re.sub(r"[^a-z0-9._-]+", "-", (path.name if asked.model else path.stem).lower()).strip("-._")
    return f"{words[:NAME_LENGTH] or 'model'}-small"


def _layout(fit: Fit) -> dict[str, Any]:
    """How rows are split and laid out."""
    validation, test = (0.15, 0.25) if fit.units < FEW_UNITS else (0.05, 0.1)
    return {
        "validation_fraction": validation,
        "test_fraction": test,
        "shards": 4 if fit.rows >= LARGE_ROWS else 1,
        "rows_per_group": 4 if fit.rows < SMALL_ROWS else 16,
    }


def _cpus() -> dict[str, int]:
    """Of this machine, for each of what runs at the same time; one of a cluster, whose nodes may be smaller."""
    if ray_cluster.is_remote():
        return dict.fromkeys(("worker_cpus", "actor_cpus", "trial_cpus"), 1)
    cores, logical = available_cpus(), ray_cluster.local_cpus()  # of which one reads
    return {
        "worker_cpus": max(1, min(cores, logical - 1)),
        "actor_cpus": max(1, min(cores, logical - 1) // AT_ONCE),
        "trial_cpus": max(1, cores // AT_ONCE),
    }


def _schedule(
    asked: Asked, given: GivenModel | None, fit: Fit, settings: TemplateSettings, share: float
) -> dict[str, Any]:
    rows = round(fit.rows * (1 - sum(_layout(fit)[f"{name}_fraction"] for name in ("validation", "test"))))
    # It is shortened less: students lack what their teacher lacks, and controls that learn from the data do not.
    steps, why = settings.teacher_steps.steps(rows, math.sqrt(share)), "trained from scratch: no MODEL was given"
    if given is not None:
        if asked.finetune is not None:
            steps, why = (
                asked.finetune,
                f"the given model, trained {format_count(asked.finetune, 'step')} on the data first, as asked",
            )
        elif fit.refit:
            why = f"the given model, trained on the data first: {fit.refit}"
        else:
            steps, why = 0, "the given model as it is: what it can do is what students are held against"
    rates = settings.given_learning_rates if given else settings.learning_rates or settings.given_learning_rates
    return {
        "teacher_why": template.comment(why),
        **_steps("teacher", steps, settings.teacher_steps, rates.teacher),
        **_steps("student", settings.student_steps.steps(rows, share), settings.student_steps, rates.students),
    }


def _steps(whose: str, steps: int, schedule: Schedule, rate: float) -> dict[str, Any]:
    return {
        f"{whose}_steps": steps,
        f"{whose}_batch": schedule.batch_size,
        f"{whose}_rate": f"{rate:.1e}",
        f"{whose}_warmup": steps // 10,
    }


def _students(chosen: ChosenStudents) -> str:
    lines = []
    for student in chosen.students:
        sizes = ", ".join(f"{format_number(student.mb[variant])} MB in {variant}" for variant in chosen.variants)
        lines += [
            f"    - name: {student.name}  # about {sizes}",
            f"      model: {template.flow(dict(student.model))}",
            f"      teacher_weight: {TEACHER_WEIGHT}",
        ]
    return "\n".join(lines)


def _rules(asked: Asked, settings: TemplateSettings, title: str) -> str:
    """The rules that follow from the budget, each with what it asks."""
    rules = [
        f"{{kind: keep, against: teacher, at_least: {asked.keep:g}}}  # of the teacher's {title}, with its interval"
    ]
    if asked.max_mb is None:
        times = settings.least_times_smaller
        rules.append(f"{{kind: smaller, against: teacher, at_least: {times:g}}}  # there is no --max-mb")
    else:
        rules.append(f"{{kind: size, at_most_mb: {asked.max_mb:g}}}")
    if asked.max_p95_ms is not None:
        rules.append(
            f"{{kind: latency, percentile: 95, at_most_ms: {asked.max_p95_ms:g}}}  # on the machine that runs it"
        )
    return "\n".join(f"    - {rule}" for rule in rules)


def _reasons(
    asked: Asked, given: GivenModel | None, kind: str, fit: Fit, values: Mapping[str, Any], chosen: ChosenStudents,
    tested: int, share: float,
) -> dict[str, str]:  # fmt: skip
    limit = (
        f"within {asked.max_mb:g} MB" if asked.max_mb is not None else "of those smaller by half, no --max-mb was given"
    )
    whole = " (whole: every layer, quantised)" if any(s.name == WHOLE for s in chosen.students) else ""
    steps = f"{format_count(values['student_steps'], 'step')} each"
    if share < 1:
        steps += f", {100 * share:.0f} % of what there would be without --max-minutes"
        if values["teacher_steps"] > 0 and asked.finetune is None:
            steps += f" (the teacher has {100 * math.sqrt(share):.0f} %)"
    names = ", ".join(f"{s.name} of {s.size.parameters:,} parameters" for s in chosen.students)
    fitting = f"the one that fits {'the model and ' if given else ''}the data"
    return {
        "task": f"{kind}: {'as asked' if asked.task else fitting}",
        **fit.reasons,
        "teacher": f"{given.described if given else 'new'}; {values['teacher_why']}; {values['teacher_steps']:,} "
        f"steps, {chosen.teacher.parameters:,} parameters, {format_number(chosen.teacher_mb)} MB unquantised",
        "students": f"{names}{whole}: the largest {limit}; {steps}",
        "formats": f"{', '.join(chosen.variants)}: "
        + ", ".join(
            f"{s.name} about {format_number(s.mb[v])} MB in {v}" for s in chosen.students for v in chosen.variants
        ),
        "gate": f"keeps {100 * asked.keep:g} % of the teacher's {TASKS[kind].quality.title} at the far end of "
        f"the interval, of about {tested:,} test {TASKS[kind].test_unit}s"
        + (f"; {asked.max_mb:g} MB at most" if asked.max_mb is not None else "")
        + (f"; p95 latency {asked.max_p95_ms:g} ms at most" if asked.max_p95_ms is not None else ""),
        **({"--set": f"{', '.join(asked.overrides)}: over what stands above, as asked"} if asked.overrides else {}),
    }


def _header(asked: Asked, reasons: Mapping[str, str]) -> str:
    lines = [f"Written by `overproof init {asked.command}`; it is yours to edit."]
    lines += [f"{what}: {why}" for what, why in reasons.items()]
    texts = map(template.comment, lines)
    wrapped = (part for text in texts for part in textwrap.wrap(text, COMMENT_WIDTH - 2, subsequent_indent="  "))
    return "".join(f"# {part}\n" for part in wrapped)
