"""The compress stage: trained models as files that engines read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from overproof.artifacts import Artifact
from overproof.config import Served
from overproof.data.heartbeat import Heartbeat
from overproof.data.manifest import Manifest
from overproof.export.base import TEACHER, Difference, ExportContext, Format, WeighedFormat
from overproof.files import FrozenModel
from overproof.models.hf_directory import read_config
from overproof.models.sizes import family_of
from overproof.registry import FORMATS
from overproof.stage_context import StageContext

EXPORTS = "exports.json"


class Export(FrozenModel):
    """One exported file. Candidates are what the gate may choose from; the others are what they are held against.

    ``student`` is the model it was made from, whose unquantised file bears its name: a student, or the teacher of a
    candidate; None for the teacher's and the control's own.
    """

    name: str
    student: str | None
    file: str
    format: str  # the variant, such as "q8_0"
    size_bytes: int
    candidate: bool
    difference_nats: float | None = None  # of an unquantised file: how far its log-probabilities are from the model's
    checked_positions: int | None = None  # and places of the longest row that this was looked at on
    companions: tuple[str, ...] = ()  # files that a package needs beside it


EXPORT_LIST = TypeAdapter(tuple[Export, ...])


def read_exports(root: Path) -> tuple[Export, ...]:
    """The exports of a finished compress stage."""
    return EXPORT_LIST.validate_json((root / EXPORTS).read_bytes())


def export_models(context: StageContext) -> dict[str, Any]:
    """Write teacher, control and every kept student unquantised, and those students, and where the recipe says so the
    teacher, in every variant of the recipe.
    Of a teacher that is served, or that the format does not hold, there is no file.

    The teacher that is to answer with a draft is written in its own variant, too.

    Raises:
        InputError: a model or tokenizer has a feature that the format does not cover.
        RuntimeError: an unquantised file, read back, is not the model it was made from.
    """
    settings, written = context.recipe.compress, FORMATS[context.recipe.compress.kind]
    prepared, teacher = context.parents["prepare"], context.parents["train"].local("model/") / "model"
    planned = list(_planned(context, written))
    exports: list[Export] = []
    with context.draft.directory() as root, Heartbeat(context.progress, "compress", len(planned)) as heartbeat:
        given = ExportContext(
            settings, context.recipe.name, teacher, Manifest.read(prepared).tokenizer(prepared), prepared,
            context.recipe.seed, heartbeat.update_note,
        )  # fmt: skip
        companions = written.companions(given)
        for name, student, variant, source in planned:
            heartbeat.start_phase(len(exports), f"{name} to {settings.kind}, {variant}")
            file = root / f"{name}{written.suffix}"
            whole = root / f"{name if student is None else student}{written.suffix}"
            written.write(source, file, variant, given, whole)
            held = None
            if variant == written.unquantised:
                heartbeat.start_phase(len(exports), f"{file.name}, held against its model")
                held = require_same_model(written, source, file)
            elif isinstance(written, WeighedFormat) and whole != file:
                heartbeat.start_phase(len(exports), f"{file.name}, held against {whole.name}")
                written.require_same_weights(file, whole)
            export = Export(
                name=name, student=student, file=file.name, format=variant, size_bytes=file.stat().st_size,
                candidate=student not in (None, name), companions=tuple(companions),
                difference_nats=held.nats if held else None, checked_positions=held.positions if held else None,
            )  # fmt: skip
            exports.append(export)
            heartbeat.start_phase(len(exports), f"{file.name} {export.size_bytes / 1e6:.2f} MB")
        for name, source in companions.items():
            shutil.copyfile(source, root / name)
        (root / EXPORTS).write_text(json.dumps([e.model_dump() for e in exports], indent=1) + "\n", encoding="utf-8")
    return {"size_bytes": {export.name: export.size_bytes for export in exports}}


def export_folder(compressed: Artifact, file: str) -> Path:
    """Where an exported file lies on this machine, with what describes it; the others stay in the store."""
    companions = {name for export in read_exports(compressed.local(EXPORTS)) for name in export.companions}
    return compressed.local(file, EXPORTS, *companions)


def _planned(context: StageContext, written: Format) -> list[tuple[str, str | None, str, Path]]:
    """Name, student, variant and source of every file, the unquantised ones first."""
    swept, recipe = context.parents["sweep"].local("trials.json", "control/", "students/"), context.recipe
    kept: list[str] = json.loads((swept / "trials.json").read_text(encoding="utf-8"))["kept"]
    references = {TEACHER: context.parents["train"].local("model/") / "model", "control": swept / "control"}
    if isinstance(recipe.train.model, Served) or not _is_held(written, references[TEACHER]):
        del references[TEACHER]
    students = {name: swept / "students" / name for name in kept}
    compressed = students | ({TEACHER: references[TEACHER]} if recipe.compress.teacher else {})
    planned: list[tuple[str, str | None, str, Path]] = [
        *((name, None, written.unquantised, source) for name, source in references.items()),
        *((name, name, written.unquantised, source) for name, source in students.items()),
        *((f"{name}-{v}", name, v, source) for name, source in compressed.items() for v in recipe.compress.formats),
    ]
    drafted = recipe.speculate
    if drafted is not None and drafted.teacher not in {name for name, *_ in planned}:
        planned.append((drafted.teacher, None, drafted.teacher_format, references[TEACHER]))
    return planned


def _is_held(written: Format, source: Path) -> bool:
    """Whether a format holds models of a directory's family."""
    return family_of(read_config(source), source)[0] in written.families


def require_same_model(written: Format, source: Path, file: Path) -> Difference:
    """Compare an unquantised file, read back, with the model it was made from.

    Raises:
        RuntimeError: they differ by more than rounding explains.
    """
    found = written.difference(source, file)
    if not found.nats <= found.explained_nats:
        raise RuntimeError(
            f"{file}: read back, its log-probabilities are {found.nats:.3g} nats from the model's it was made from "
            f"where they differ most, on rows of {found.positions} places at most; expected {found.explained_nats:g} "
            "at most: the export is wrong"
        )
    return found
