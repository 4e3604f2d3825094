"""Which students and variants a budget leaves, by what their files will take."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from overproof.config.distillation import Student
from overproof.config.models import ModelSection, Pretrained
from overproof.config.student_models import Pruned, TeacherLayers
from overproof.errors import InputError
from overproof.models.base import ConvolutionalFamily, DataShape
from overproof.models.sizes import ModelSize, directory_config, model_size, student_size
from overproof.registry import FAMILIES
from overproof.shrink.given_model import GivenModel
from overproof.shrink.template import BytesANumber, TemplateSettings
from overproof.units import format_number

CHANNELS = 32  # of a feed-forward layer, by whose multiples it is narrowed where they divide it
STAGE_CHANNELS = 8  # of a stage of convolutions, by whose multiples it is narrowed
WHOLE = "whole"  # the student that keeps every layer of a given teacher


@dataclass(frozen=True)
class SizedStudent:
    """A student, and the megabytes of its file in each variant."""

    name: str
    model: Mapping[str, Any]
    size: ModelSize
    mb: Mapping[str, float]

    @property
    def smallest(self) -> tuple[str, float]:
        """The variant that takes least, and its MB."""
        return min(self.mb.items(), key=lambda item: item[1])


@dataclass(frozen=True)
class ChosenStudents:
    """What is tried, the largest first, in which variants; and what the teacher takes."""

    teacher: ModelSize
    teacher_mb: float  # unquantised
    students: tuple[SizedStudent, ...]
    variants: tuple[str, ...]


def choose_students(
    settings: TemplateSettings,
    teacher: ModelSection,
    given: GivenModel | None,
    shape: DataShape,
    max_mb: float | None,
    variants: Sequence[str],
) -> ChosenStudents:
    """The largest students of which some variant's file is within ``max_mb``, and the variants that are within it.

    ``variants`` are those that the format writes. Without a limit the whole teacher is no student of itself.

    Raises:
        InputError: the model does not fit the data, or no file would be within the limit.
    """
    teacher_size = model_size(teacher, shape)
    if teacher_size.predictions == 1 and teacher_size.outputs != shape.outputs:
        raise InputError(
            f"MODEL: tells {teacher_size.outputs} classes or bins apart, the data have {shape.outputs}; expected a "
            "model of the same, or none (-), and a teacher is trained"
        )
    beside = settings.file_bytes + (given.tokenizer_bytes if given and settings.vocabulary_in_file else 0)
    rates = {variant: settings.bytes[variant] for variant in variants}
    unquantised = list(settings.bytes.values())[-1]

    def mb(size: ModelSize, rate: BytesANumber) -> float:
        return (beside + settings.layer_bytes * size.layers + weights_bytes(size, rate)) / 1e6

    candidates = []
    for name, model in _models(settings, given, teacher, teacher_size, shape).items():
        size = student_size(Student.parse({"name": name, "model": model}, name).model, teacher, shape)
        candidates.append(SizedStudent(name, model, size, {v: mb(size, rate) for v, rate in rates.items()}))
    teacher_mb = mb(teacher_size, unquantised)
    limit = teacher_mb / settings.least_times_smaller if max_mb is None else max_mb
    fitting = [c for c in candidates if c.smallest[1] <= limit and (max_mb is not None or c.name != WHOLE)]
    if not fitting:
        raise InputError(_nothing_fits(settings, candidates, max_mb, rates, beside))
    students = tuple(fitting[: settings.keep])
    within = tuple(v for v in variants if any(c.mb[v] <= limit for c in students))
    return ChosenStudents(teacher_size, teacher_mb, students, within)


def weights_bytes(size: ModelSize, rate: BytesANumber) -> float:
    """What a model's numbers take in a file of a variant."""
    vector, table = max(size.hidden, size.intermediate), size.outputs * size.hidden
    return sum(
        numbers * (rate.vector if numbers <= vector else rate.table if numbers == table else rate.matrix)
        for numbers in size.tensors
    )


def _models(
    settings: TemplateSettings, given: GivenModel | None, teacher: ModelSection, size: ModelSize, shape: DataShape
) -> dict[str, dict[str, Any]]:
    """Every student there may be, the largest first."""
    if given is None:
        return settings.students
    found = dict[str, dict[str, Any]]()
    family = FAMILIES[size.family]
    if isinstance(family, ConvolutionalFamily):
        return narrowed_students(settings, directory_config(given.path), family)
    for count in sorted({max(1, round(share * size.layers)) for share in settings.shares}, reverse=True):
        if count == size.layers:
            found[WHOLE] = {"kind": "teacher_layers", "layers": count}
        elif FAMILIES[size.family].section is None:  # of whose layers little is known
            found[f"layers-{count}"] = {"kind": "teacher_layers", "layers": count}
        else:
            found[f"pruned-{round(100 * count / size.layers)}"] = _pruned(teacher, size, count, shape)
    return found


def narrowed_students(
    settings: TemplateSettings, config: Mapping[str, Any], family: ConvolutionalFamily
) -> dict[str, dict[str, Any]]:
    """Of a convolutional teacher: as large a share of its numbers, which go by the square of its channels; none twice.

    A first stage that would have to be as wide as the stem, which the teacher's is not, is a step narrower.
    """
    found, hidden_sizes = dict[str, dict[str, Any]](), list(map(int, config["hidden_sizes"]))
    for share in sorted(settings.shares, reverse=True):
        steps = (max(1, round(math.sqrt(share) * channels / STAGE_CHANNELS)) for channels in hidden_sizes)
        kept = [min(STAGE_CHANNELS * n, channels) for n, channels in zip(steps, hidden_sizes, strict=True)]
        if not _may_be(config, family, kept):
            kept[0] = max(STAGE_CHANNELS // 2, kept[0] - STAGE_CHANNELS)
        model = {"kind": "pruned", "hidden_sizes": kept}
        if share == 1 or (kept != hidden_sizes and model not in found.values()):
            found[WHOLE if share == 1 else f"pruned-{round(100 * share)}"] = model
    return found


def _may_be(config: Mapping[str, Any], family: ConvolutionalFamily, hidden_sizes: Sequence[int]) -> bool:
    try:
        family.narrowed(config, tuple(hidden_sizes))
    except InputError:
        return False
    return True


def _pruned(teacher: ModelSection, size: ModelSize, count: int, shape: DataShape) -> dict[str, Any]:
    """As large as so many layers, with more of them that are narrower: of each part a little costs the least."""
    layers = max(1, round(math.sqrt(count * size.layers)))
    wanted = student_size(TeacherLayers(layers=count), teacher, shape).parameters

    def parameters(channels: int) -> int:
        return student_size(Pruned(layers=layers, intermediate_size=channels), teacher, shape).parameters

    step = math.gcd(size.intermediate, CHANNELS)
    fewest, most = parameters(step), parameters(size.intermediate)
    share = (wanted - fewest) / max(1, most - fewest)
    channels = step * (1 + round(share * (size.intermediate / step - 1)))
    return {
        "kind": "pruned", "layers": layers, "intermediate_size": min(size.intermediate, max(step, channels)),
    }  # fmt: skip


def _family_section(model: Mapping[str, Any]) -> ModelSection:
    section = FAMILIES[model["kind"]].section
    assert section is not None  # templates name families that recipes build
    return section.parse(model)


def teacher_section(settings: TemplateSettings, given: GivenModel | None) -> ModelSection:
    """The recipe's section of the teacher."""
    if given is not None:
        return Pretrained(path=given.path)
    assert settings.teacher is not None  # tasks whose teacher cannot be trained here ask for one
    return _family_section(settings.teacher)


def _nothing_fits(
    settings: TemplateSettings, candidates: Sequence[SizedStudent], max_mb: float | None,
    rates: Mapping[str, BytesANumber], beside: float,
) -> str:  # fmt: skip
    nearest = min(candidates, key=lambda c: c.smallest[1])
    variant, found = nearest.smallest
    size, numbers = nearest.size, max(nearest.size.tensors)
    rate = rates[variant].table if numbers == size.outputs * size.hidden else rates[variant].matrix
    shape = f"{numbers // size.hidden:,} x {size.hidden:,}"
    parts = f"{format_number(numbers * rate / 1e6)} MB of it its largest table, of {shape}"
    if beside > 1e5:
        parts += f", {format_number(beside / 1e6)} MB the vocabulary itself"
    needed = math.ceil(found * 100) / 100
    if max_mb is None:
        times = f"{settings.least_times_smaller:g} times smaller than the teacher"
        why = f"no --max-mb was given, and no student of fewer layers would be {times}"
    else:
        why = f"--max-mb {max_mb:g}: no student's file would be as small"
    return (
        f"{why}; the nearest is {nearest.name} in {variant}, about "
        f"{format_number(found)} MB ({parts}): give --max-mb {needed:g}, or a narrower model"
    )
