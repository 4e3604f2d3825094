"""Checks of what students start from, before anything runs. Light to import: no model is loaded."""

from __future__ import annotations

from overproof.artifacts import Artifact
from overproof.config import Pretrained, Student
from overproof.data.manifest import Manifest
from overproof.data.tokenizer_match import require_tokenizer
from overproof.distill.row_cache import teacher_folder
from overproof.errors import InputError
from overproof.models import pretrained
from overproof.models.base import shape_of
from overproof.models.sizes import ModelSize, model_size, student_size
from overproof.registry import FAMILIES
from overproof.stage_context import Progress, no_progress


def absolute_student(student: Student) -> Student:
    """The same student, as processes with other working directories find what it starts from."""
    if not isinstance(student.model, Pretrained):
        return student
    return student.model_copy(update={"model": pretrained.absolute_pretrained(student.model)})


def check_student(student: Student, prepared: Artifact, trained: Artifact, progress: Progress = no_progress) -> None:
    """Refuse a student that cannot start from what it names, or cannot be compared with the teacher as it asks.

    Raises:
        InputError: its directory is none, is of another kind of model, has another number of outputs or another
            tokenizer; or the teacher lacks a layer that it asks for, or widths or places of theirs do not fit.
    """
    manifest = Manifest.read(prepared)
    shape = shape_of(manifest)
    teacher = Pretrained(path=str(teacher_folder(trained)))
    try:
        found = student_size(student.model, teacher, shape)
        if isinstance(student.model, Pretrained):
            _check_directory(student.model.path, found, manifest, prepared, progress)
        if student.relations or student.states:
            _check_comparable(student, found, model_size(teacher, shape))
    except InputError as error:
        raise InputError(f"student {student.name}: {error}") from None


def _check_directory(path: str, found: ModelSize, manifest: Manifest, prepared: Artifact, progress: Progress) -> None:
    if manifest.task not in FAMILIES[found.family].tasks or found.outputs != manifest.outputs:
        raise InputError(
            f"{path}: a {found.family} with {found.outputs} outputs; the data is for {manifest.task} and needs "
            f"{manifest.outputs}"
        )
    require_tokenizer(pretrained.fetch_pretrained(path, progress), prepared)


def _check_comparable(student: Student, found: ModelSize, teacher: ModelSize) -> None:
    for model, who in ((teacher, "teacher"), (found, "student")):
        if not FAMILIES[model.family].names.feed_forward:
            raise InputError(f"relations, states: a {who} of the family {model.family} has no layers; expected none")
    for name, part in (("relations", student.relations), ("states", student.states)):
        if part and part.teacher_layer is not None and part.teacher_layer >= teacher.layers:
            raise InputError(f"{name}.teacher_layer {part.teacher_layer}: the teacher has {teacher.layers} layers")
    if student.relations and not all(FAMILIES[size.family].names.has_attention for size in (found, teacher)):
        raise InputError(f"relations: a {found.family} has no attention; expected none, or states")
    if found.places != teacher.places:
        raise InputError(
            f"it has {found.places} places in a row and the teacher {teacher.places}; expected equally many to compare "
            "them: give both one patch_size"
        )
    for model, who in ((found, "it"), (teacher, "the teacher")):
        for width in (model.query_width, model.key_width):
            if student.relations and width % student.relations.heads:
                raise InputError(
                    f"relations.heads {student.relations.heads} does not divide {width}, the width of queries or keys "
                    f"that {who} has"
                )
