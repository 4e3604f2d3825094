"""What a recipe must satisfy before anything starts, as far as it can be known then, and how large its models are."""

from __future__ import annotations

from typing import Any

from overproof import console
from overproof.artifacts import Artifact
from overproof.cluster.recipe_checks import Finding
from overproof.config import ModelSection, OfTeacher, Pretrained, Recipe, Served, ZeroSettings
from overproof.data.manifest import Manifest
from overproof.data.tokenizer_match import require_possible_tokenizer
from overproof.engines.endpoint import Endpoint
from overproof.errors import InputError, suggest_name
from overproof.export.base import SizedFormat
from overproof.export.check_models import check_models
from overproof.models.base import ComposedFamily, ConvolutionalFamily, DataShape, shape_of
from overproof.models.sizes import (
    ModelSize,
    directory_config,
    family_of,
    model_size,
    require_apart,
    require_varlen,
    student_size,
)
from overproof.models.student_config import left_config
from overproof.registry import FAMILIES, FORMATS, TASKS
from overproof.tasks.base import TokenTask
from overproof.units import format_count


def data_shape(recipe: Recipe, prepared: Artifact | None) -> DataShape:
    """What models must fit. Until the data is prepared its source is looked at, and a vocabulary is the recipe's limit.

    Raises:
        InputError: the source cannot be read.
    """
    if prepared is None:
        with console.waiting("looking at the data"):
            return TASKS[recipe.data.kind].shape(recipe.data)
    return shape_of(Manifest.read(prepared))


def require_exportable(recipe: Recipe) -> list[Finding]:
    """Ask the recipe's format about the tokenizer, the chat template and every model that a directory describes, before
    anything is trained: any decoder can be trained, not all exported. What the recipe itself describes has been held
    against the format as it was read. Gives a warning for what the format's engines leave out.

    Raises:
        InputError: it cannot hold one, a line for each, or a directory's files cannot be read.
    """
    format = FORMATS[recipe.compress.kind]
    with console.waiting("looking at the tokenizer"):
        left_out = TASKS[recipe.data.kind].check_export(recipe.data, format)
        teacher = recipe.train.model.path if isinstance(recipe.train.model, Pretrained) else None
        format.check_template(recipe.compress, teacher)
    findings = [Finding("tokenizer", "warning", line) for line in left_out]
    taught = recipe.train.model
    models = {"train.model": taught} | {f"student {s.name}": s.model for s in recipe.sweep.students}
    kind, tokenizer = recipe.compress.kind, getattr(recipe.data, "tokenizer", None)
    asked, teaching = dict[str, dict[str, Any]](), dict[str, dict[str, Any]]()
    for where, model in models.items():
        if model is taught and isinstance(model, Pretrained) and (warned := _teaches_alone(recipe, model)):
            findings.append(warned)
            teaching[f"{where}: {model.path}"] = directory_config(model.path)
        elif isinstance(model, Pretrained):
            asked[f"{where}: {model.path}"] = _config_of_a_known_family(model.path, kind, where)
        elif isinstance(model, OfTeacher) and isinstance(taught, Pretrained):
            config = _config_of_a_known_family(taught.path, kind, where)
            _, family = family_of(config, taught.path)
            try:
                asked[f"{where}: what is left of {taught.path}"] = left_config(config, model, family)
            except InputError as error:
                raise InputError(f"{where}: {error}") from None
    if asked:
        with console.waiting(f"asking {kind} about {format_count(len(asked), 'model')}"):
            check_models(kind, recipe.data.positions, asked, recipe.compress.formats)
    # Of a teacher that is no directory sizes follow from the data.
    if recipe.compress.most_mb is not None and isinstance(format, SizedFormat) and isinstance(taught, Pretrained):
        shape = data_shape(recipe, None)
        for student in recipe.sweep.students:
            format.require_size(recipe.compress, student_size(student.model, taught, shape), f"student {student.name}")
        if recipe.compress.teacher:
            format.require_size(recipe.compress, model_size(taught, shape), "the teacher")
    for named, config in (asked | teaching).items() if recipe.data.apart else ():
        require_apart(config, named)
    for model in models.values():
        if isinstance(model, Pretrained) and tokenizer is not None:
            require_possible_tokenizer(tokenizer, model.path)
    return findings


def require_served(recipe: Recipe) -> None:
    """Ask the endpoint of a teacher that is served whether it has the model.

    Raises:
        InputError: it has not, or cannot be asked now.
    """
    if isinstance(recipe.train.model, Served):
        Endpoint(recipe.train.model.model_copy(update={"retry_s": 0.0})).model_entry()


def _teaches_alone(recipe: Recipe, teacher: Pretrained) -> Finding | None:
    """A warning where no file of a teacher is needed, and none could be made."""
    task, format, config = TASKS[recipe.data.kind], FORMATS[recipe.compress.kind], directory_config(teacher.path)
    kind, family = family_of(config, teacher.path)
    if recipe.needs_teacher_file or not isinstance(task, TokenTask) or kind in format.families:
        return None
    return Finding(
        "train.model", "warning",
        f"architecture {config['architectures'][0]} is not written as {recipe.compress.kind}: it teaches, and torch "
        f"measures its {task.quality.title}; its size and speed are not known"
        f"{'' if isinstance(family, ComposedFamily) else format.further_families}",
    )  # fmt: skip


def _config_of_a_known_family(path: str, format: str, where: str) -> dict[str, Any]:
    config = directory_config(path)
    kind, _ = family_of(config, path)
    families = FORMATS[format].families
    if kind not in families:
        held = [name for family in families for name in FAMILIES[family].architectures if not name.startswith("!")]
        [named, *_] = config["architectures"]
        raise InputError(
            f"{where}: {path}/config.json: architecture {named} can be trained and not be written as "
            f"{format}{suggest_name(named, held)}; expected {' or '.join(held)}{FORMATS[format].further_families}"
        )
    return config


def require_trainable(recipe: Recipe) -> None:
    """Look whether models can be trained as they are asked to: by lengths, where they find several texts in a row.

    Raises:
        InputError: they cannot, or a row holds one text.
    """
    asked: list[tuple[str, ZeroSettings | None, list[ModelSection]]] = [
        ("train", recipe.train, [recipe.train.model]),
        ("sweep.group", recipe.sweep.group, [student.model for student in recipe.sweep.students]),
    ]
    for where, settings, models in asked:
        if settings is None:
            continue
        sources = [recipe.train.model if isinstance(model, OfTeacher) else model for model in models]
        kinds = [_family_kind(source) for source in sources if not isinstance(source, Served)]
        for family in map(FAMILIES.__getitem__, kinds):
            if isinstance(family, ConvolutionalFamily):
                family.require_training(settings, where)
        if settings.attention == "sdpa":
            continue
        if not recipe.data.apart:
            raise InputError(
                f"{where}.attention: varlen: goes by texts that are kept apart in a row; rows of this data are read as "
                "one text: expected sdpa"
            )
        for kind in kinds:
            require_varlen(kind, where)


def _family_kind(model: ModelSection) -> str:
    return family_of(directory_config(model.path), model.path)[0] if isinstance(model, Pretrained) else model.kind


def student_sizes(recipe: Recipe, shape: DataShape) -> dict[str, ModelSize]:
    """Of each student, by name.

    Raises:
        InputError: one cannot be made from what it names.
    """
    sizes = {}
    for student in recipe.sweep.students:
        try:
            sizes[student.name] = student_size(student.model, recipe.train.model, shape)
        except InputError as error:
            raise InputError(f"student {student.name}: {error}") from None
    return sizes


def starting_sizes(recipe: Recipe, shape: DataShape) -> dict[str, ModelSize]:
    """Of each student as it begins, at most: one that is pruned in rounds counts as its teacher does."""
    sizes = student_sizes(recipe, shape)
    slow = [student.name for student in recipe.sweep.students if student.rounds > 1]
    return sizes | (dict.fromkeys(slow, model_size(recipe.train.model, shape)) if slow else {})
